"""`pipeline("feature-extraction")` gives the embeddings of `embed`, or refuses."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, pipeline

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.modeling import UniGDFeatureExtractionPipeline
from tiny_models import make_image, make_vlm


CHAT = [
    {"role": "user", "content": [{"type": "image", "image": make_image(3)}, {"type": "text", "text": "what is it"}]}
]
SEQUENCES = ["a red cat", make_image(1), ["two blue dogs", make_image(2, (40, 20)), "and"], CHAT]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved model, and the embeddings that it has of `SEQUENCES`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny = make_vlm("llava")
    model = UniGDForConditionalGeneration.from_vlm(tiny.model, head_type="mlp", embedding_dim=8)
    processor = UniGDProcessor(tiny.processor)
    model.add_soft_prompts(**processor.add_soft_prompts())
    model.processor = processor
    model.save_pretrained(folder)
    with torch.no_grad():
        alone = [model.embed(**processor.process_sequences([sequence])) for sequence in SEQUENCES]
    return folder, torch.cat(alone)


@pytest.fixture(scope="module")
def pipe(checkpoint, modules_cache):
    return pipeline("feature-extraction", model=str(checkpoint[0]), trust_remote_code=True, device="cpu")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_pipeline_embeds(checkpoint, pipe, batch_size):
    _, expected = checkpoint
    found = pipe(SEQUENCES, batch_size=batch_size, return_tensors=True)
    assert [tuple(embedding.shape) for embedding in found] == [(1, 8)] * len(SEQUENCES)
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=0)


def test_one_sequence_needs_no_list(checkpoint, pipe):
    _, expected = checkpoint
    for place in (0, 1, 3):
        torch.testing.assert_close(
            torch.tensor(pipe(SEQUENCES[place])), expected[place : place + 1], atol=1e-5, rtol=0
        )


def test_arguments_for_a_tokenizer_are_refused(pipe):
    with pytest.raises(TypeError, match="truncation"):
        pipe("a red cat", truncation=True)


def test_without_trust_the_pipeline_refuses(checkpoint):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("feature-extraction", model=str(checkpoint[0]), device="cpu")


def test_the_class_can_be_passed_instead_of_trust(checkpoint):
    folder, expected = checkpoint
    pipe = pipeline(
        "feature-extraction", model=str(folder), pipeline_class=UniGDFeatureExtractionPipeline, device="cpu"
    )
    torch.testing.assert_close(torch.tensor(pipe("a red cat")), expected[:1], atol=1e-5, rtol=0)


def test_a_model_that_holds_its_processor_uses_it(checkpoint):
    """As one of an adapter does, where `pipeline` loads the processor of the base model."""
    folder, expected = checkpoint
    model = AutoModel.from_pretrained(folder)
    model.processor = UniGDProcessor.from_pretrained(folder)
    others = UniGDProcessor(make_vlm("llava").processor, prompts={"text": "red"})
    pipe = UniGDFeatureExtractionPipeline(model, others, device="cpu")
    torch.testing.assert_close(torch.tensor(pipe("a red cat")), expected[:1], atol=1e-5, rtol=0)
    model.processor = None
    pipe = UniGDFeatureExtractionPipeline(model, others, device="cpu")
    assert (torch.tensor(pipe("a red cat")) - expected[:1]).abs().max() > 1e-3


# What a stranger runs: no hf_unigd, only transformers and the checkpoint.
STRANGER = """
import json, sys
sys.modules["hf_unigd"] = None  # any import of it raises
from transformers import AutoModelForMultimodalLM, pipeline

folder = sys.argv[1]
pipe = pipeline("feature-extraction", model=folder, trust_remote_code=True, device="cpu")
speaker = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
pipe.save_pretrained("again")
again = pipeline("feature-extraction", model="again", trust_remote_code=True, device="cpu")
print(json.dumps({
    "class": type(speaker).__name__,
    "embeddings": [*pipe("a red cat"), *again("a red cat")],
}))
"""


def test_a_stranger_has_the_pipeline_and_the_multimodal_class(checkpoint, tmp_path):
    folder, expected = checkpoint
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["class"] == "UniGDForConditionalGeneration"
    torch.testing.assert_close(torch.tensor(seen["embeddings"]), expected[[0, 0]], atol=1e-5, rtol=0)
