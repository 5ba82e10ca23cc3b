"""Adapters load in one line, with hf_unigd and without it, on one of our checkpoints and on a plain LLaVA."""

import json
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from hf_unigd import UniGDForConditionalGeneration, UniGDModel
from hf_unigd.hub import load_checkpoint
from tiny_adapters import SEQUENCES, answers, make_adapter


# What strangers run: transformers, PEFT and sentence-transformers, but no hf_unigd.
STRANGER = """
import json, sys
import torch
from PIL import Image
sys.modules["hf_unigd"] = None  # any import of it raises
from peft import AutoPeftModel
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

seen = {}
for on in ("plain", "ours"):
    folder = f"{on}/adapter"
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    images = [Image.open(f"{name}.png") for name in "ab"]
    sequences = ["a red cat", [images[0]], ["two blue dogs", images[1]]]
    batch = processor.process_sequences(sequences, padding_side="left")
    speaker = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    embedder = AutoModel.from_pretrained(folder, trust_remote_code=True)
    models = {"AutoModel": embedder, "AutoModelForImageTextToText": speaker}
    if on == "ours":
        models["AutoPeftModel"] = AutoPeftModel.from_pretrained(folder, trust_remote_code=True)
    seen[on] = {name: model.embed(**batch).tolist() for name, model in models.items()}
    sentences = SentenceTransformer(folder, trust_remote_code=True)
    mixed = [sequences[0], sequences[1][0], {"text": sequences[2][0], "image": sequences[2][1]}]
    seen[on]["SentenceTransformer"] = sentences.encode(mixed).tolist()
    seen[on]["answers"] = {
        name: processor.batch_decode(model.generate(**batch, max_new_tokens=8, do_sample=False))
        for name, model in models.items()
        if name != "AutoModel"
    }
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    expected = {}
    for on in ("plain", "ours"):
        model, processor = make_adapter(folder / on, on=on)
        embeddings = model.embed(**processor.process_sequences(SEQUENCES)).tolist()
        expected[on] = {"embeddings": embeddings, "answers": answers(model, processor)}
    SEQUENCES[1][0].save(folder / "a.png")
    SEQUENCES[2][1].save(folder / "b.png")
    (folder / "expected.json").write_text(json.dumps(expected))
    return folder


def test_strangers_load_adapters_in_one_line(folder):
    result = subprocess.run(
        [sys.executable, "-c", STRANGER],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    expected = json.loads((folder / "expected.json").read_text())
    assert set(seen["ours"]) - set(seen["plain"]) == {"AutoPeftModel"}
    for on, by_consumer in seen.items():
        for consumer, spoken in by_consumer.pop("answers").items():
            assert spoken == expected[on]["answers"], (on, consumer)
        for consumer, embeddings in by_consumer.items():
            difference = (torch.tensor(embeddings) - torch.tensor(expected[on]["embeddings"])).abs().max()
            assert difference < 1e-5, (on, consumer)


@pytest.mark.parametrize("on", ["plain", "ours"])
def test_adapters_load_with_hf_unigd(folder, on):
    name = folder / on / "adapter"
    expected = json.loads((folder / "expected.json").read_text())[on]
    batch = AutoProcessor.from_pretrained(name).process_sequences(SEQUENCES, padding_side="left")
    for model in (
        AutoModel.from_pretrained(name),
        AutoModelForImageTextToText.from_pretrained(name),
        load_checkpoint(str(name))[0],
    ):
        difference = (model.embed(**batch) - torch.tensor(expected["embeddings"])).abs().max()
        assert difference < 1e-5
        assert set(model.processor.soft_prompt_ids) <= set(model.vlm.generation_config.suppress_tokens)
    # The Auto classes resolve the id of an adapter on the Hub to that of the model beneath it before they call us.
    redirected = {"_adapter_model_path": str(name), "revision": None}
    model = UniGDModel.from_pretrained(folder / on / "base", adapter_kwargs=redirected)
    assert (model.embed(**batch) - torch.tensor(expected["embeddings"])).abs().max() < 1e-5


def test_an_adapter_with_a_missing_or_changed_tensor_is_refused(folder, tmp_path):
    name = folder / "ours" / "adapter"
    tensors = load_file(name / "adapter_model.safetensors")
    for file in name.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    lost = next(key for key in tensors if key.endswith("up_proj.lora_B.weight"))
    save_file({key: t for key, t in tensors.items() if key != lost}, tmp_path / "adapter_model.safetensors")
    for load in (UniGDForConditionalGeneration.from_pretrained, load_checkpoint):
        with pytest.raises(RuntimeError, match=r"would leave tensors random(?s:.)*up_proj\.lora_B"):
            load(tmp_path)
    save_file(
        {key: t for key, t in tensors.items() if "embedding_head" not in key}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(RuntimeError, match=r"would leave tensors random(?s:.)*embedding_head"):
        load_checkpoint(tmp_path)
    save_file({**tensors, lost: tensors[lost] + 1}, tmp_path / "adapter_model.safetensors")
    for load in (UniGDModel.from_pretrained, UniGDForConditionalGeneration.from_pretrained, load_checkpoint):
        with pytest.raises(RuntimeError, match="does not compute what it did"):
            load(tmp_path)
    load_checkpoint(tmp_path, check_probe=False)


def test_an_adapter_that_names_no_model_says_so(folder, tmp_path):
    name = folder / "ours" / "adapter"
    for file in name.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((name / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        UniGDModel.from_pretrained(tmp_path)


def test_peft_refuses_an_adapter_on_a_plain_model_rather_than_drop_its_head(folder):
    # It would load LLaVA beneath, which has no place for what was trained: never a wrong model without a word.
    with pytest.raises(ValueError, match="not found in the base model"):
        AutoPeftModel.from_pretrained(folder / "plain" / "adapter")
