"""Loading and saving: never a random weight, and without hf_unigd installed."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from hf_unigd import UniGDForConditionalGeneration, UniGDModel, UniGDProcessor
from tiny_models import FAMILIES, make_image, make_vlm


SEQUENCES = [[make_image(1)], "a red cat", ["two blue dogs", make_image(2, (40, 20))]]

# What a user without hf_unigd runs, who has only transformers and the checkpoint.
STRANGER = """
import json, sys
import torch
from PIL import Image
sys.modules["hf_unigd"] = None  # any import of it raises
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
embedder = AutoModel.from_pretrained(folder, trust_remote_code=True)
speaker = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
images = [Image.open(f"{folder}/{name}.png") for name in "ab"]
batch = processor.process_sequences([[images[0]], "a red cat", ["two blue dogs", images[1]]], padding_side="left")
generated = speaker.generate(**batch, max_new_tokens=8, do_sample=False)
embedder.save_pretrained(f"{folder}/again")
print(json.dumps({
    "class": [type(embedder).__name__, type(speaker).__name__, type(processor).__name__],
    "embeddings": embedder(**batch).embeddings.tolist(),
    "same": torch.equal(embedder.embed(**batch), speaker.embed(**batch)),
    "text": processor.batch_decode(generated),
    "prompts": processor.prompts,
}))
"""


@pytest.mark.parametrize("family", ["llava", "llava_next"])  # the others' processors need torchvision in transformers
def test_a_stranger_loads_model_and_processor(family, tmp_path):
    tiny = make_vlm(family)
    processor = UniGDProcessor(tiny.processor, prompts={"image": "What is in the image"})
    model = UniGDForConditionalGeneration.from_vlm(tiny.model, head_type="mlp", embedding_dim=8)
    model.add_soft_prompts(**processor.add_soft_prompts())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for name, sequence in zip("ab", (SEQUENCES[0], SEQUENCES[2]), strict=True):
        sequence[-1].save(tmp_path / f"{name}.png")

    result = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])

    batch = processor.process_sequences(SEQUENCES, padding_side="left")
    assert seen["class"] == ["UniGDModel", "UniGDForConditionalGeneration", "UniGDProcessor"]
    torch.testing.assert_close(torch.tensor(seen["embeddings"]), model.embed(**batch), atol=1e-6, rtol=0)
    assert seen["same"]
    generated = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert seen["text"] == processor.batch_decode(generated)
    assert seen["prompts"] == processor.prompts
    # What the embedding class saved again still generates, and holds the same code.
    assert {file.name for file in (tmp_path / "again").glob("*.py")} == {file.name for file in tmp_path.glob("*.py")}
    again = UniGDForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(again.generate(**batch, max_new_tokens=8, do_sample=False), generated)


def test_auto_classes_are_registered(llava, tmp_path):
    model, processor = llava
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)).__name__ == "UniGDConfig"
    assert isinstance(AutoModel.from_pretrained(tmp_path), UniGDModel)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), UniGDForConditionalGeneration)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), UniGDProcessor)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_survives_a_round_trip(family, tmp_path):
    tiny = make_vlm(family)
    model = UniGDForConditionalGeneration.from_vlm(tiny.model, head_type="linear", embedding_dim=8)
    model.save_pretrained(tmp_path)
    loaded = UniGDForConditionalGeneration.from_pretrained(tmp_path)
    for (name, expected), (loaded_name, tensor) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == loaded_name
        assert torch.equal(expected, tensor), name
    tied = tiny.model.get_output_embeddings().weight is tiny.model.get_input_embeddings().weight
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_from_vlm_pretrained_takes_every_tensor_from_the_checkpoint(family, tmp_path):
    tiny = make_vlm(family)
    tiny.model.save_pretrained(tmp_path)
    model = UniGDForConditionalGeneration.from_vlm_pretrained(
        tmp_path, head_type="linear", embedding_dim=8, attn_implementation="eager"
    )
    assert model.config.embedding_dim == 8
    assert model.vlm.config.get_text_config()._attn_implementation == "eager"
    for name, expected in tiny.model.state_dict().items():
        assert torch.equal(model.vlm.state_dict()[name], expected), name


# How released checkpoints name their tensors: as before transformers 4.52, and as the modules are named since.
OLD_NAMES = {
    "llava": {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "model.": ""},
    "qwen2_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
}


def old_name(name, family):
    for new, old in OLD_NAMES.get(family, OLD_NAMES["llava"]).items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


@pytest.mark.parametrize("era", ["old", "new"])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_vlm_pretrained_reads_old_and_new_checkpoints(family, era, tmp_path):
    tiny = make_vlm(family)
    tiny.model.save_pretrained(tmp_path)
    weights = {
        old_name(name, family) if era == "old" else name: tensor.clone()
        for name, tensor in tiny.model.state_dict().items()
        if not (family == "qwen2_vl" and name == "lm_head.weight")  # tied: not in released files
    }
    expected_prefix = {
        "old": {"qwen2_vl": "visual."}.get(family, "language_model.lm_head."),
        "new": "model.language_model.",
    }
    assert any(name.startswith(expected_prefix[era]) for name in weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = UniGDForConditionalGeneration.from_vlm_pretrained(tmp_path)
    for name, expected in tiny.model.state_dict().items():
        assert torch.equal(model.vlm.state_dict()[name], expected), name


@pytest.mark.parametrize("cls", [UniGDModel, UniGDForConditionalGeneration])
@pytest.mark.parametrize(
    ("on_disk", "lost"),  # the backbone's tensors keep their native names on disk
    [
        ("embedding_head.projection.weight", "embedding_head.projection.weight"),
        ("embedding_head.logit_scale", "embedding_head.logit_scale"),
        ("vlm.language_model.lm_head.weight", "vlm.lm_head.weight"),
        ("vlm.multi_modal_projector.linear_1.bias", "vlm.model.multi_modal_projector.linear_1.bias"),
    ],
)
def test_loading_names_the_tensors_that_would_be_random(cls, on_disk, lost, tmp_path):
    model = UniGDForConditionalGeneration.from_vlm(make_vlm().model, head_type="linear", embedding_dim=8)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[on_disk]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=f"(?s)random.*{lost}"):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", [UniGDModel, UniGDForConditionalGeneration])
def test_tensors_in_memory_are_loaded_as_by_any_model(cls):
    model = UniGDForConditionalGeneration.from_vlm(make_vlm().model, head_type="mlp", embedding_dim=8)
    loaded = cls.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert type(loaded) is cls
    for (name, expected), (loaded_name, tensor) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == loaded_name and torch.equal(expected, tensor)
    # As transformers' own tests do: what is not given is initialised, and named.
    empty, info = cls.from_pretrained(None, config=model.config, state_dict={}, output_loading_info=True)
    assert set(info["missing_keys"]) == model.state_dict().keys()
    assert all(torch.isfinite(parameter).all() for parameter in empty.parameters())
    assert empty.embedding_head.logit_scale.item() == pytest.approx(model.config.logit_scale_init_value)


def test_loading_with_another_head_than_saved_raises(llava, tmp_path):
    llava[0].save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"embedding_head\.projection"):
        UniGDModel.from_pretrained(tmp_path, head_type="mlp", embedding_dim=8)


def test_a_plain_backbone_without_its_lm_head_raises(tmp_path):
    make_vlm().model.model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="lm_head"):
        UniGDForConditionalGeneration.from_vlm_pretrained(tmp_path)


def test_a_plain_checkpoint_is_not_mistaken_for_ours(tmp_path):
    tiny = make_vlm()
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_vlm_pretrained"):
        UniGDModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_vlm_pretrained"):
        UniGDProcessor.from_pretrained(tmp_path)
    assert UniGDProcessor.from_vlm_pretrained(tmp_path).prompts["text"].endswith("in one word")
