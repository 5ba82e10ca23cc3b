"""Checkpoints of every released format keep loading, to the embeddings and tokens that their own code gave.

`tests/fixtures/format_N` was written, without the code, by the last revision of that format (format 1: abcfe1e, before
the probe), and so was `format_N_adapter` on top of it; `expected.json` is what that revision computed.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from hf_unigd import UniGDConfig
from hf_unigd.hub import load_checkpoint


FIXTURES = Path(__file__).parents[1] / "fixtures"
FORMATS = sorted(folder for folder in FIXTURES.glob("format_*") if folder.name[7:].isdigit())


def make_batch(folder, processor):
    picture = Image.open(folder / "picture.png")
    return processor.process_sequences([[picture], "a red cat", ["two blue dogs", picture]], padding_side="left")


def assert_expected(folder, model, batch):
    expected = json.loads((folder / "expected.json").read_text())
    torch.testing.assert_close(model.embed(**batch), torch.tensor(expected["embeddings"]), atol=1e-5, rtol=0)
    temperature = model.embedding_head.logit_scale
    assert temperature.shape == (1,) and temperature.item() == pytest.approx(expected["temperature"], abs=1e-6)
    if model.can_generate():
        assert model.generate(**batch, max_new_tokens=8, do_sample=False).tolist() == expected["tokens"]


@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
def test_a_whole_checkpoint(folder, auto_class):
    batch = make_batch(folder, AutoProcessor.from_pretrained(folder))
    assert_expected(folder, auto_class.from_pretrained(folder), batch)


@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
def test_saved_again_it_has_the_newest_format(folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["checkpoint_format"] == UniGDConfig().checkpoint_format
    model, processor = load_checkpoint(str(tmp_path))
    assert_expected(folder, model, make_batch(folder, processor))


@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
def test_an_adapter(folder, tmp_path):
    adapter = shutil.copytree(f"{folder}_adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder)  # it was elsewhere when the adapter was trained
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    model, processor = load_checkpoint(str(adapter))
    assert_expected(adapter, model, make_batch(folder, processor))


def test_the_formats_are_there():
    assert [folder.name for folder in FORMATS][:1] == ["format_1"]
