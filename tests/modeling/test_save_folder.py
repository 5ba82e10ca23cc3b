"""Saves go into new folders and over earlier saves of the same model, never among another model's weights."""

import shutil

import pytest

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.modeling.save_folder_unigd import check_save_folder
from tiny_adapters import make_adapter
from tiny_models import make_vlm


def make_model(family="llava", **settings):
    model = UniGDForConditionalGeneration.from_vlm(make_vlm(family).model, **settings)
    model.verify_saves = False
    return model


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = make_adapter(folder, on="ours")
    return folder / "adapter", model


def save_a_plain_model(folder):
    make_vlm().model.save_pretrained(folder)


def save_another_head(folder):
    make_model(head_type="linear", embedding_dim=4).save_pretrained(folder)


def save_another_family(folder):
    make_model("qwen2_vl", head_type="linear", embedding_dim=8).save_pretrained(folder)


def save_weights_alone(folder):
    save_a_plain_model(folder)
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("save_other", "reason"),
    [
        (save_a_plain_model, "`model_type` is 'llava'"),
        (save_another_head, "`embedding_dim` is 4, and that of the model to save is 8"),
        (save_another_family, r"`vlm_config\.\S+` is .*, and that of the model to save is"),
        (save_weights_alone, "without a config.json"),
    ],
)
def test_another_models_folder_is_refused_before_anything_is_written(tmp_path, save_other, reason):
    save_other(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=rf"(?s)holds another model \(model.safetensors; {reason}.*Nothing was"):
        make_model(head_type="linear", embedding_dim=8).save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_whole_models_and_adapters_do_not_share_a_folder(adapter, tmp_path):
    folder, model = adapter
    shutil.copytree(folder, tmp_path / "adapter")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds an adapter \(adapter_config.json\), so a whole model is not"):
        make_model().save_pretrained(tmp_path / "adapter")
    assert contents(tmp_path) == before
    make_model().save_pretrained(tmp_path / "whole")
    with pytest.raises(FileExistsError, match=r"holds a whole model \(model.safetensors\), so an adapter is not"):
        check_save_folder(tmp_path / "whole", model.config, is_adapter=True)


def test_an_adapter_of_another_model_is_refused(adapter, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"holds another model .*without a config.json"):
        check_save_folder(tmp_path, adapter[1].config, is_adapter=True)
    check_save_folder(adapter[0], adapter[1].config, is_adapter=True)  # its own


def test_the_same_model_is_saved_again_among_what_a_run_leaves(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "README.md").write_text("# A card")
    model = make_model(head_type="mlp", embedding_dim=8)
    model.save_pretrained(tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    model.save_pretrained(tmp_path)
    processor = UniGDProcessor(make_vlm().processor)  # soft prompts change the vocabulary, not the model
    model.add_soft_prompts(**processor.add_soft_prompts())
    model.save_pretrained(tmp_path)
    UniGDForConditionalGeneration.from_pretrained(tmp_path).save_pretrained(tmp_path)
