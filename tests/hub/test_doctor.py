"""A checkpoint damaged in every way that is feared: loading refuses it, and the doctor says why."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_unigd import UniGDForConditionalGeneration, UniGDModel, UniGDProcessor
from hf_unigd.cli.main import main
from hf_unigd.modeling.probe_unigd import PROBE_NAME
from tiny_models import make_vlm


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healthy")
    tiny = make_vlm("llava")
    torch.manual_seed(0)
    model = UniGDForConditionalGeneration.from_vlm(tiny.model, head_type="mlp", embedding_dim=8)
    model.processor = UniGDProcessor(tiny.processor)
    model.add_soft_prompts(**model.processor.add_soft_prompts())
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(healthy, tmp_path):
    return shutil.copytree(healthy, tmp_path / "checkpoint")


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def examine(folder, capsys):
    """Whether the doctor finds no fault, and what it prints."""
    try:
        main(["doctor", str(folder)])
    except SystemExit as stop:
        assert stop.code == 1
        return False, capsys.readouterr().out
    return True, capsys.readouterr().out


def test_a_healthy_checkpoint_has_no_faults(checkpoint, capsys):
    healthy, page = examine(checkpoint, capsys)
    assert healthy
    for line in ("No faults.", "logits off by 0", "the same inputs as then", "soft-prompt tokens", "float32"):
        assert line in page
    for consumer in ("transformers", "sentence-transformers", "MTEB", "PEFT", "plain LLaVA"):
        assert f"for {consumer}" in page


def remove_head(folder):
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "embedding_head" in name])


def rename_tensor(folder):
    def rename(tensors):
        name = next(name for name in tensors if name.endswith("projection.0.weight"))
        tensors[name.replace("projection", "projector")] = tensors.pop(name)

    change_tensors(folder, rename)


def add_tensor(folder):
    change_tensors(folder, lambda tensors: tensors.update(left_over=torch.ones(3)))


def edit_prompt(folder):
    # The soft prompts have as many tokens as the written prompt had: another one no longer says what they began as.
    change_json(folder, "processor_config.json", lambda c: c["soft_prompts"]["text"].pop())


def change_weight(folder):
    def change(tensors):
        name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
        tensors[name][3] += 0.5

    change_tensors(folder, change)


def change_vision_weight(folder):
    def change(tensors):
        name = next(name for name in tensors if "vision" in name and name.endswith("layers.0.mlp.fc2.weight"))
        tensors[name] *= -1

    change_tensors(folder, change)


def strip_tokenizer(folder):
    def strip(content):
        content["added_tokens"] = [t for t in content["added_tokens"] if "unigd" not in t["content"]]

    change_json(folder, "tokenizer.json", strip)
    (folder / "tokenizer_config.json").write_text("{}")


def change_template(folder):
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("ASSISTANT", "BOT"))


def write_nan(folder):
    change_tensors(folder, lambda tensors: tensors[next(n for n in tensors if "lm_head" in n)][0].fill_(torch.nan))


@pytest.mark.parametrize(
    ("damage", "error", "finding"),
    [
        (remove_head, "would leave tensors random", "projection.0.weight"),
        (rename_tensor, "would leave tensors random", "embedding_head.projector.0.weight"),
        (add_tensor, None, "unexpected, and not loaded: left_over"),
        (change_weight, "does not compute what it did", "logits off by"),
        (change_vision_weight, "does not compute what it did", "logits off by"),
        (write_nan, "does not compute what it did", "not finite"),
    ],
)
def test_damaged_weights_are_refused_and_named(checkpoint, capsys, damage, error, finding):
    damage(checkpoint)
    for model_class in (UniGDModel, UniGDForConditionalGeneration):
        if error is not None:
            with pytest.raises(RuntimeError, match=error):
                model_class.from_pretrained(checkpoint)
    healthy, page = examine(checkpoint, capsys)
    assert not healthy
    assert any("FAULT" in line and finding in line for line in page.splitlines()), page


@pytest.mark.parametrize("damage", [edit_prompt, strip_tokenizer, change_template])
def test_a_damaged_processor_is_refused_and_named(checkpoint, capsys, damage):
    damage(checkpoint)
    with pytest.raises((ValueError, OSError, TypeError)):
        UniGDProcessor.from_pretrained(checkpoint)
    healthy, page = examine(checkpoint, capsys)
    assert not healthy
    assert any("FAULT" in line and ("prompts" in line or "processor" in line) for line in page.splitlines()), page


def test_missing_files_are_named(checkpoint, capsys):
    (checkpoint / "modeling_unigd.py").unlink()
    (checkpoint / PROBE_NAME).unlink()
    (checkpoint / "modules.json").unlink()
    healthy, page = examine(checkpoint, capsys)
    assert not healthy
    assert "missing: modeling_unigd.py" in page
    assert f"no {PROBE_NAME}" in page
    assert "no modules.json" in page


def test_what_is_no_checkpoint_of_ours_is_said(tmp_path):
    make_vlm("llava").model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="is no checkpoint of hf-unigd"):
        main(["doctor", str(tmp_path)])


def test_a_newer_format_is_refused(checkpoint):
    change_json(checkpoint, "config.json", lambda config: config.update(checkpoint_format=99))
    with pytest.raises(ValueError, match="format 99, and this code knows formats up to 1"):
        UniGDModel.from_pretrained(checkpoint)
