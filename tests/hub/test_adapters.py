"""Adapters load in one line, with hf_unigd and without it, if their base model is ours and if it is a plain LLaVA."""

import json
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from hf_unigd import UniGDForConditionalGeneration, UniGDModel, UniGDProcessor
from hf_unigd.hub import examine, load_checkpoint, report
from tiny_adapters import SEQUENCES, answers, make_adapter
from tiny_models import make_vlm


# What users without hf_unigd run, who have transformers, PEFT and sentence-transformers.
STRANGER = """
import json, sys
import torch
from PIL import Image
sys.modules["hf_unigd"] = None  # any import of it raises
from peft import AutoPeftModel, LoraConfig, get_peft_model
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
    # The Auto classes resolve the id of an adapter on the Hub to that of its base model before they call us.
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
    load_checkpoint(tmp_path, verify="none")


def test_a_base_model_may_have_other_weights_than_safetensors(tmp_path):
    make_adapter(tmp_path, on="plain")
    weights = tmp_path / "base" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    for verify in ("probe", "digests"):
        load_checkpoint(tmp_path / "adapter", verify=verify)


def test_an_adapter_that_names_no_base_model_is_refused(folder, tmp_path):
    name = folder / "ours" / "adapter"
    for file in name.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((name / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        UniGDModel.from_pretrained(tmp_path)


def test_peft_refuses_an_adapter_on_a_plain_model_rather_than_drop_its_head(folder):
    # Its base model is a plain LLaVA, which has no place for the trained head.
    with pytest.raises(ValueError, match="not found in the base model"):
        AutoPeftModel.from_pretrained(folder / "plain" / "adapter")


def test_a_merged_adapter_can_be_trained(folder):
    model, _ = load_checkpoint(str(folder / "ours" / "adapter"))
    assert all(parameter.requires_grad for parameter in model.parameters())


def make_users_adapter(folder, head_type="mlp", on="plain", modules_to_save=None, target_modules=("q_proj",), **head):
    """An adapter as users of PEFT make it, on a base model with trained soft prompts if it is `"ours"`."""
    tiny = make_vlm()
    torch.manual_seed(0)
    head["embedding_dim"] = None if head_type == "none" else 8
    if on == "plain":
        tiny.model.save_pretrained(folder / "base")
        model = UniGDForConditionalGeneration.from_vlm_pretrained(folder / "base", head_type=head_type, **head)
        processor = UniGDProcessor(tiny.processor)
    else:
        base = UniGDForConditionalGeneration.from_vlm(tiny.model, head_type=head_type, **head)
        base.processor = processor = UniGDProcessor(tiny.processor)
        base.add_soft_prompts(**processor.add_soft_prompts())
        with torch.no_grad():
            base.get_input_embeddings().weight[processor.soft_prompt_ids] += 0.1
        base.save_pretrained(folder / "base")
        model = UniGDForConditionalGeneration.from_pretrained(folder / "base")
    model.processor, model.verify_saves = processor, False
    target_modules = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(r=4, target_modules=target_modules, modules_to_save=modules_to_save, init_lora_weights=False)
    peft_model = get_peft_model(model, config).eval()
    peft_model.save_pretrained(folder / "adapter")
    model.config.save_pretrained(folder / "adapter")
    processor.save_pretrained(folder / "adapter")
    return model, processor


@pytest.mark.parametrize(
    "target_modules", [["q_proj"], "all-linear"]
)  # the second adapts the head, and does not save it
@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_a_head_that_would_be_new_is_refused_by_name(head_type, target_modules, tmp_path):
    make_users_adapter(tmp_path, head_type, target_modules=target_modules)
    name = tmp_path / "adapter"
    lost = r"embedding_head\.projection\.(0\.)?weight.*the head would be new at every load"
    for load in (UniGDModel.from_pretrained, UniGDForConditionalGeneration.from_pretrained, load_checkpoint):
        with pytest.raises(RuntimeError, match=rf"{lost}.*UniGDTrainer.*modules_to_save=\['embedding_head'\]"):
            load(name)
    page = report(examine(name))
    assert any(
        line.startswith("FAULT") and "the head would be new at every load" in line for line in page.splitlines()
    )


@pytest.mark.parametrize(
    ("settings", "on"),
    [
        ({"head_type": "mlp", "modules_to_save": ["embedding_head"]}, "plain"),
        (
            {"head_type": "none", "logit_scale_init_value": 2.0, "logit_scale_max_value": 3.0},
            "plain",
        ),  # nothing is new
        ({"head_type": "mlp"}, "ours"),  # the base model has the head, and the soft prompts
        ({"head_type": "mlp", "modules_to_save": ["embedding_head"]}, "ours"),
    ],
)
def test_a_users_adapter_loads_if_its_head_is_saved_somewhere(settings, on, tmp_path):
    model, processor = make_users_adapter(tmp_path, on=on, **settings)
    batch = processor.process_sequences(SEQUENCES)
    for loaded in (UniGDModel.from_pretrained(tmp_path / "adapter"), load_checkpoint(tmp_path / "adapter")[0]):
        torch.testing.assert_close(loaded.embed(**batch), model.embed(**batch), atol=1e-5, rtol=0)
        temperatures = loaded.embedding_head.inverse_temperature, model.embedding_head.inverse_temperature
        assert torch.equal(*temperatures)
        assert loaded.config.logit_scale_max_value == model.config.logit_scale_max_value


def test_a_trained_temperature_that_is_not_saved_is_refused(tmp_path):
    model, _ = make_users_adapter(tmp_path, head_type="none")
    model.save_companions(tmp_path / "adapter")
    load_checkpoint(tmp_path / "adapter")
    with torch.no_grad():
        model.embedding_head.logit_scale += 0.5
    model.save_companions(tmp_path / "adapter")
    for verify in ("none", "probe", "digests"):
        with pytest.raises(RuntimeError, match=r"lacks embedding_head\.logit_scale.*would be new at every load"):
            load_checkpoint(tmp_path / "adapter", verify=verify)
