"""The digests: written with every checkpoint, and different from any other checkpoint's."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from hf_unigd import UniGDForConditionalGeneration, UniGDModel, UniGDProcessor
from hf_unigd.hub import load_checkpoint, save_digests
from hf_unigd.modeling.digests_unigd import DIGESTS_NAME
from tiny_adapters import make_adapter
from tiny_models import make_vlm


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A whole model, and an adapter on it."""
    folder = tmp_path_factory.mktemp("digests")
    make_adapter(folder, on="ours")
    return {"whole": folder / "base", "adapter": folder / "adapter"}


@pytest.fixture
def checkpoint(folders, tmp_path):
    return shutil.copytree(folders["whole"], tmp_path / "checkpoint")


def digests(folder):
    return json.loads((folder / DIGESTS_NAME).read_text())


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_every_file_and_tensor_has_its_digest(kind, folders):
    folder, saved = folders[kind], digests(folders[kind])
    weights = "model.safetensors" if kind == "whole" else "adapter_model.safetensors"
    of_sentence_transformers = {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"}
    others = {DIGESTS_NAME, weights, *of_sentence_transformers}
    assert saved["files"].keys() == {file.name for file in folder.iterdir()} - others
    for name, digest in saved["files"].items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    tensors = load_file(folder / weights)
    assert saved["tensors"].keys() == tensors.keys()
    name, tensor = next((name, tensor) for name, tensor in tensors.items() if tensor.dtype == torch.float32)
    header = json.dumps(["F32", list(tensor.shape)]).encode()
    assert saved["tensors"][name] == hashlib.sha256(header + tensor.numpy().tobytes()).hexdigest()


def load_all(folder, **kwargs):
    load_checkpoint(str(folder), **kwargs)
    for auto_class in (AutoModel, AutoProcessor):
        auto_class.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_what_was_saved_loads_with_every_check(kind, folders):
    for verify in ("none", "probe", "digests"):
        load_all(folders[kind], verify=verify)


def test_the_digests_do_not_depend_on_files(checkpoint, tmp_path):
    model, _ = load_checkpoint(str(checkpoint))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert digests(tmp_path / "sharded")["tensors"] == digests(checkpoint)["tensors"]
    load_checkpoint(str(tmp_path / "sharded"), verify="digests")


def test_noise_that_the_probe_cannot_see_has_another_digest(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if "embed_tokens" in name)
    tensors[name][-1] += 1
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    UniGDModel.from_pretrained(checkpoint)
    with pytest.raises(RuntimeError, match=f"is not what was saved: tensors changed: {name}"):
        UniGDModel.from_pretrained(checkpoint, verify="digests")


@pytest.mark.parametrize("name", ["modeling_unigd.py", "tokenizer_config.json", "generation_config.json"])
def test_an_edited_file_has_another_digest_until_it_is_renewed(checkpoint, name):
    with (checkpoint / name).open("a") as file:
        file.write("\n")
    load_all(checkpoint)
    for load in (UniGDModel.from_pretrained, UniGDProcessor.from_pretrained):
        with pytest.raises(RuntimeError, match=f"files changed: {name}.*save_digests"):
            load(checkpoint, verify="digests")
    save_digests(checkpoint)
    load_all(checkpoint, verify="digests")


def test_missing_and_added_files_are_named(checkpoint):
    (checkpoint / "chat_template.jinja").rename(checkpoint / "chat_template.json")
    with pytest.raises(RuntimeError, match=r"files missing: chat_template\.jinja; files added: chat_template\.json"):
        UniGDProcessor.from_pretrained(checkpoint, verify="digests")


def test_what_is_no_part_of_a_checkpoint_has_no_digest(checkpoint):
    (checkpoint / "README.md").write_text("# A card")
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "checkpoint-2").mkdir()
    load_all(checkpoint, verify="digests")


def test_a_checkpoint_without_digests_cannot_be_compared_with_them(checkpoint):
    (checkpoint / DIGESTS_NAME).unlink()
    load_all(checkpoint)
    for load in (UniGDModel.from_pretrained, UniGDProcessor.from_pretrained):
        with pytest.raises(ValueError, match=r"has no digests\.json, so `verify='digests'` cannot compare"):
            load(checkpoint, verify="digests")


@pytest.mark.parametrize("content", ["{", "[]", '{"files": {}}', '{"files": {"../secret": ""}, "tensors": {}}'])
def test_damaged_digests_are_refused(checkpoint, content):
    (checkpoint / DIGESTS_NAME).write_text(content)
    with pytest.raises(ValueError, match=DIGESTS_NAME):
        UniGDModel.from_pretrained(checkpoint, verify="digests")


@pytest.mark.parametrize("load", [UniGDModel.from_pretrained, UniGDProcessor.from_pretrained, load_checkpoint])
def test_an_unknown_check_is_refused(folders, load):
    for folder in folders.values():
        with pytest.raises(ValueError, match="`verify` must be one of 'none', 'probe', 'digests', got True"):
            load(folder, verify=True)


def test_a_processor_that_is_saved_after_the_model_renews_the_digests_of_files(tmp_path):
    tiny = make_vlm()
    UniGDForConditionalGeneration.from_vlm(tiny.model).save_pretrained(tmp_path)
    before = digests(tmp_path)
    UniGDProcessor(tiny.processor).save_pretrained(tmp_path)
    assert "processor_config.json" in digests(tmp_path)["files"].keys() - before["files"].keys()
    load_all(tmp_path, verify="digests")


def test_sentence_transformers_saves_digests_too(checkpoint, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(checkpoint), trust_remote_code=True)
    model.save_pretrained(str(tmp_path / "again"))
    load_all(tmp_path / "again", verify="digests")
    assert digests(tmp_path / "again")["tensors"] == digests(checkpoint)["tensors"]
