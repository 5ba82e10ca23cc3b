"""Instructions that are saved with a checkpoint: every library that embeds uses them alike."""

import json
import re

import pytest
import torch
from mteb._create_dataloaders import create_dataloader
from mteb.models import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from transformers import pipeline

from hf_unigd import UniGDForConditionalGeneration, UniGDModel, UniGDProcessor
from hf_unigd.hub.doctor import examine, report
from hf_unigd.hub.export import export_checkpoint
from mteb_tasks import retrieval
from tiny_instructions import CHAT, INSTRUCTIONS, SEQUENCES, A, B, embed, make_model
from tiny_models import make_vlm


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder)
    return folder


def test_a_changed_instruction_is_found_at_loading(tmp_path):
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "instructions": {**INSTRUCTIONS, "query": "Find the cat."}}))
    with pytest.raises(ValueError, match="no longer makes the inputs"):
        UniGDProcessor.from_pretrained(tmp_path)
    assert re.search(
        r"FAULT instructions +config_sentence_transformers\.json has the prompts", report(examine(tmp_path))
    )


def test_the_doctor_lists_them(checkpoint):
    page = report(examine(checkpoint))
    assert "document: 'Summarize the car.', query: 'Find the dog.'" in page and "No faults." in page, page


def test_sentence_transformers_and_the_pipeline_embed_alike(checkpoint, modules_cache):
    model = UniGDModel.from_pretrained(checkpoint)
    model.processor = UniGDProcessor.from_pretrained(checkpoint)
    expected = {name: embed(model, prompt_name=name) for name in INSTRUCTIONS}
    plain = embed(model)
    assert all((one - plain).abs().max() > 1e-3 for one in expected.values())

    inputs = ["a red cat", A, {"text": "two blue dogs", "image": B}, CHAT]
    sentences = SentenceTransformer(str(checkpoint), trust_remote_code=True, device="cpu")
    assert {name: text for name, text in sentences.prompts.items() if text} == INSTRUCTIONS
    found = {name: sentences.encode(inputs, prompt_name=name, convert_to_tensor=True) for name in INSTRUCTIONS}
    for name, vectors in found.items():
        torch.testing.assert_close(vectors, expected[name], atol=1e-5, rtol=0)
    for encode, name in ((sentences.encode_query, "query"), (sentences.encode_document, "document")):
        torch.testing.assert_close(encode(inputs, convert_to_tensor=True), expected[name], atol=1e-5, rtol=0)
    torch.testing.assert_close(sentences.encode(inputs, convert_to_tensor=True), plain, atol=1e-5, rtol=0)
    other = sentences.encode(inputs, prompt="Find it. ", convert_to_tensor=True)
    torch.testing.assert_close(other, embed(model, instruction="Find it."), atol=1e-5, rtol=0)

    pipe = pipeline("feature-extraction", model=str(checkpoint), trust_remote_code=True, device="cpu")
    vectors = torch.cat(pipe(SEQUENCES, prompt_name="query", return_tensors=True, batch_size=2))
    torch.testing.assert_close(vectors, expected["query"], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:Some prompts are not in the expected format")
@pytest.mark.parametrize("category", ["i2t", "t2i", "it2it"])
def test_mteb_embeds_alike(checkpoint, modules_cache, category):
    """MTEB knows `query` and `document`, and says that it does not know `colours`."""
    wrapper = SentenceTransformerEncoderWrapper(str(checkpoint), trust_remote_code=True, device="cpu")
    wrapper.mteb_model_meta = wrapper.mteb_model_meta.model_copy(update={"modalities": ["image", "text"]})
    model = UniGDModel.from_pretrained(checkpoint)
    model.processor = UniGDProcessor.from_pretrained(checkpoint)
    task = retrieval(category)
    task.load_data()
    data = task.dataset["default"]["test"]
    for name, side in (("query", data["queries"]), ("document", data["corpus"])):
        settings = {"task_metadata": task.metadata, "prompt_type": PromptType(name)}
        loader = create_dataloader(side, **settings)
        found = wrapper.encode(loader, **settings, hf_split="test", hf_subset="default", show_progress_bar=False)
        sequences = [[row[kind] for kind in ("image", "text") if row.get(kind) is not None] for row in side]
        expected = embed(model, sequences, prompt_name=name)
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_an_export_embeds_alike(family, tmp_path):
    tiny = make_vlm(family)
    model = UniGDForConditionalGeneration.from_vlm(tiny.model)
    model.processor = UniGDProcessor(tiny.processor, instructions=INSTRUCTIONS)
    model.save_pretrained(tmp_path / "checkpoint")
    export_checkpoint(str(tmp_path / "checkpoint"), tmp_path / "export", "vlm")
    exported = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    for given in (["a red cat", A, {"image": B, "text": "two dogs"}], [CHAT[1:]]):
        sequences = [[B, "two dogs"] if isinstance(each, dict) else each for each in given]
        for encode, name in ((exported.encode_query, "query"), (exported.encode_document, "document")):
            found = encode(given, convert_to_tensor=True)
            torch.testing.assert_close(found, embed(model, sequences, prompt_name=name), atol=1e-5, rtol=0)
