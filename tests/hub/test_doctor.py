"""Checkpoints damaged in many ways: loading refuses them, and the doctor says why."""

import json
import re
import shutil
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_unigd import UniGDForConditionalGeneration, UniGDModel, UniGDProcessor
from hf_unigd.cli.main import main
from hf_unigd.hub import doctor, load_checkpoint, save_digests
from hf_unigd.hub.doctor import SENTENCE_MODULE
from hf_unigd.modeling.probe_unigd import PROBE_NAME
from tiny_adapters import make_adapter
from tiny_models import make_vlm


def save(folder, soft_prompts=False, **settings):
    tiny = make_vlm("llava")
    torch.manual_seed(0)
    model = UniGDForConditionalGeneration.from_vlm(tiny.model, head_type="mlp", embedding_dim=8)
    model.processor = UniGDProcessor(tiny.processor, **settings)
    if soft_prompts:
        model.add_soft_prompts(**model.processor.add_soft_prompts())
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return save(tmp_path_factory.mktemp("healthy"), soft_prompts=True)


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


WORKS = dict.fromkeys(("transformers", "sentence-transformers", "MTEB", "PEFT", "plain LLaVA"), "will work here")


def consumers(page):
    """What the page says about each library."""
    return {
        name: line.partition(f"for {name} ")[2].strip()
        for line in page.splitlines()
        for name in WORKS
        if f"for {name} " in line
    }


def examine(folder, capsys):
    """Whether the doctor finds no fault, and the page that it prints."""
    try:
        main(["doctor", str(folder)])
    except SystemExit as stop:
        assert stop.code == 1
        return False, capsys.readouterr().out
    return True, capsys.readouterr().out


def test_a_healthy_checkpoint_has_no_faults(checkpoint, capsys):
    healthy, page = examine(checkpoint, capsys)
    assert healthy
    for line in (
        "No faults.",
        "logits off by 0",
        "the same inputs as when it was saved",
        "soft-prompt tokens",
        "float32",
    ):
        assert line in page
    assert consumers(page) == {**WORKS, "PEFT": "a whole checkpoint, not an adapter"}


def test_an_adapter_on_one_of_our_models_is_for_all_libraries(tmp_path, capsys):
    make_adapter(tmp_path, on="ours")
    healthy, page = examine(tmp_path / "adapter", capsys)
    assert healthy, page
    assert consumers(page) == WORKS


def test_an_adapter_on_a_plain_model_is_not_for_peft(tmp_path, capsys):
    make_adapter(tmp_path, on="plain")
    healthy, page = examine(tmp_path / "adapter", capsys)
    assert healthy, page
    refusal = "`AutoPeftModel` refuses it, as a plain llava has no place for the head; use `AutoModel`"
    assert consumers(page) == {**WORKS, "PEFT": refusal}


def test_a_last_slice_checkpoint_is_not_for_plain_llava(tmp_path, capsys):
    healthy, page = examine(save(tmp_path, embedding_position="last_slice"), capsys)
    assert healthy, page
    seen = consumers(page)
    assert "`embedding_position='last_slice'` (Sugar) cannot be exported" in seen.pop("plain LLaVA")
    assert set(seen.values()) == {"will work here", "a whole checkpoint, not an adapter"}


def test_a_library_that_cannot_be_imported_is_named(checkpoint, capsys, monkeypatch):
    # As if an older version were installed, which has no `sentence_transformers.base`.
    monkeypatch.delitem(sys.modules, SENTENCE_MODULE, raising=False)
    monkeypatch.setitem(sys.modules, "sentence_transformers.base.modality", None)
    healthy, page = examine(checkpoint, capsys)
    assert healthy
    seen = consumers(page)
    for name in ("sentence-transformers", "MTEB"):
        assert "cannot be imported here" in seen[name] and "sentence_transformers.base.modality" in seen[name]
    assert seen["transformers"] == seen["plain LLaVA"] == "will work here"


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
    # The soft prompts have as many tokens as the written prompt.
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


def change_logit_scale(folder):
    change_tensors(folder, lambda tensors: tensors["embedding_head.logit_scale"].add_(0.5))


@pytest.mark.parametrize(
    ("damage", "error", "finding"),
    [
        (remove_head, "would leave tensors random", "projection.0.weight"),
        (rename_tensor, "would leave tensors random", "embedding_head.projector.0.weight"),
        (add_tensor, None, "unexpected, and not loaded: left_over"),
        (change_weight, "does not compute what it did", "logits off by"),
        (change_vision_weight, "does not compute what it did", "logits off by"),
        (change_logit_scale, "does not compute what it did", "inverse_temperature off by 0.65"),
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
    assert "will work here" not in page


@pytest.mark.parametrize(
    ("damage", "error", "finding"),
    [
        (edit_prompt, "no longer makes the inputs", "prompts, template, tokenizer"),
        (strip_tokenizer, "no padding token", "no padding token"),
        (change_template, "no longer makes the inputs", "prompts, template, tokenizer"),
    ],
)
def test_a_damaged_processor_is_refused_and_named(checkpoint, capsys, damage, error, finding):
    damage(checkpoint)
    with pytest.raises(ValueError, match=error):
        UniGDProcessor.from_pretrained(checkpoint)
    healthy, page = examine(checkpoint, capsys)
    assert not healthy
    assert any("FAULT" in line and finding in line for line in page.splitlines()), page


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({}, "prompts", {"text": "What is it about"}),
        ({}, "prompts", {"image": "What is it about"}),
        ({"embedding_position": "last_slice"}, "image_pooling", "last"),
    ],
)
def test_changed_settings_are_refused_and_named(tmp_path, capsys, settings, name, value):
    save(tmp_path, **settings)

    def change(config):
        config[name] = {**config[name], **value} if isinstance(value, dict) else value

    change_json(tmp_path, "processor_config.json", change)
    for load in (UniGDProcessor.from_pretrained, load_checkpoint):
        with pytest.raises(ValueError, match="no longer makes the inputs"):
            load(str(tmp_path))
    healthy, page = examine(tmp_path, capsys)
    assert not healthy
    assert any("FAULT" in line and "prompts, template, tokenizer" in line for line in page.splitlines()), page


@pytest.mark.parametrize("content", [b"no tensors", None])
def test_a_probe_that_cannot_be_run_is_a_fault_among_others(checkpoint, capsys, content):
    if content is None:
        probe = load_file(checkpoint / PROBE_NAME)
        save_file({n: t for n, t in probe.items() if n != "input.pixel_values"}, checkpoint / PROBE_NAME)
    else:
        (checkpoint / PROBE_NAME).write_bytes(content)
    healthy, page = examine(checkpoint, capsys)
    assert not healthy
    assert any(line.startswith("FAULT probe") for line in page.splitlines()), page
    assert consumers(page).keys() == WORKS.keys()


def test_missing_files_are_named(checkpoint, capsys):
    (checkpoint / "loading_info_unigd.py").unlink()  # which the code of the model imports from a sibling
    (checkpoint / PROBE_NAME).unlink()
    (checkpoint / "modules.json").unlink()
    healthy, page = examine(checkpoint, capsys)
    assert not healthy
    assert "missing: loading_info_unigd.py" in page
    assert f"no {PROBE_NAME}" in page
    assert "no modules.json" in page
    assert consumers(page)["transformers"] == "unreliable because of the faults above"
    assert "will work here" not in page


def test_only_the_code_that_a_checkpoint_runs_is_needed(checkpoint, capsys):
    """Another version of hf-unigd may have other files."""
    code = (checkpoint / "loading_info_unigd.py").rename(checkpoint / "another_unigd.py")
    for file in checkpoint.glob("*.py"):
        file.write_text(file.read_text().replace("from .loading_info_unigd import", f"from .{code.stem} import"))
    save_digests(checkpoint)
    healthy, page = examine(checkpoint, capsys)
    assert healthy, page
    code.unlink()
    assert "missing: another_unigd.py" in examine(checkpoint, capsys)[1]


def test_a_plain_model_is_no_checkpoint_of_ours(tmp_path, capsys):
    make_vlm("llava").model.save_pretrained(tmp_path)
    healthy, page = examine(tmp_path, capsys)
    assert not healthy
    assert page.startswith("FAULT config") and "is no checkpoint of hf-unigd" in page


def faults(folder, capsys):
    _, page = examine(folder, capsys)
    return [line.removeprefix("FAULT").strip() for line in page.splitlines() if line.startswith("FAULT")]


def test_edited_code_and_files_are_named(checkpoint, capsys):
    with (checkpoint / "head_unigd.py").open("a") as file:
        file.write("\n")
    (checkpoint / "generation_config.json").write_text("{}")
    found = faults(checkpoint, capsys)
    assert len(found) == 1 and found[0].endswith("files changed: generation_config.json, head_unigd.py")
    assert "head_unigd.py differ from those of hf-unigd" in examine(checkpoint, capsys)[1]


def test_without_digests_the_doctor_says_what_nobody_can_tell(checkpoint, capsys):
    (checkpoint / "digests.json").unlink()
    healthy, page = examine(checkpoint, capsys)
    assert healthy
    assert "no digests.json: nobody can tell" in page


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda c: c["auto_map"].update(AutoModel="somebody/else--modeling_unigd.UniGDModel")),
        ("processor_config.json", lambda c: c["auto_map"].update(AutoProcessor="somebody/else--x.UniGDProcessor")),
        ("tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["somebody/else--x.Slow", None]})),
        ("modules.json", lambda c: c[0].update(type="somebody/else--sentence_unigd.UniGDSentenceModule")),
    ],
)
def test_code_of_another_repository_is_a_fault(checkpoint, capsys, name, change):
    change_json(checkpoint, name, change)
    save_digests(checkpoint)  # as whoever changes the file on purpose would
    found = faults(checkpoint, capsys)
    assert any(line.startswith("code") and name in line and "somebody/else--" in line for line in found), found


def link_to_nothing(file):
    file.unlink()
    file.symlink_to("nothing")


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "modules.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda file: file.write_text("null"), "holds a NoneType"),
        (lambda file: file.write_text("[" * 100_000), "maximum recursion depth"),
        (lambda file: file.write_bytes(file.read_bytes()[:20]), "holds no JSON that can be read"),
        (lambda file: file.write_bytes(bytes(range(256))), "can't decode byte"),
        (link_to_nothing, "is no file, but a link to none"),
    ],
)
def test_files_that_cannot_be_read_are_lines_of_the_report(checkpoint, capsys, name, damage, finding):
    damage(checkpoint / name)
    assert any(line.startswith("files") and name in line and finding in line for line in faults(checkpoint, capsys))


@pytest.mark.parametrize(
    ("value", "error"),
    [(10**9, r"`vlm_config\.text_config\.num_hidden_layers` is 1000000000, .* larger than any"), (10**5, "many more")],
)
def test_a_config_that_asks_for_more_than_the_files_hold_builds_nothing(checkpoint, capsys, value, error):
    def change(config):
        config["vlm_config"]["text_config"]["num_hidden_layers"] = value

    change_json(checkpoint, "config.json", change)
    started = time.monotonic()
    assert any(re.search(error, line) for line in faults(checkpoint, capsys))
    with pytest.raises(ValueError, match=error):
        UniGDModel.from_pretrained(checkpoint)
    assert time.monotonic() - started < 10


def test_what_names_itself_is_refused(tmp_path, capsys):
    make_adapter(tmp_path, on="ours")
    adapter = tmp_path / "adapter"
    change_json(adapter, "processor_config.json", lambda c: c.update(vlm_processor_class="AutoProcessor"))
    with pytest.raises(ValueError, match="names 'AutoProcessor' as `vlm_processor_class`"):
        UniGDProcessor.from_pretrained(adapter)
    change_json(adapter, "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(adapter)))
    with pytest.raises(ValueError, match=r"names the base model .* which is an adapter itself"):
        UniGDModel.from_pretrained(adapter)
    found = faults(adapter, capsys)
    assert any("is an adapter itself" in line for line in found) and any("AutoProcessor" in line for line in found)


def test_a_template_without_end_is_stopped(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "PROCESSOR_SECONDS", 1)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(loop)
    assert any("see its chat template" in line for line in faults(checkpoint, capsys))


def test_a_newer_format_is_refused(checkpoint):
    change_json(checkpoint, "config.json", lambda config: config.update(checkpoint_format=99))
    with pytest.raises(ValueError, match="format 99, but this version of hf-unigd reads formats up to 1"):
        UniGDModel.from_pretrained(checkpoint)
