"""A part of `make families`, and what is refused."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PaliGemmaProcessor, SiglipImageProcessorPil

from families import CHECKS, HEADER, is_good, run_check
from hf_unigd import UniGDConfig, UniGDForConditionalGeneration, UniGDProcessor
from tiny_models import make_tokenizer
from tiny_models.building import BUILDERS


DOCUMENT = Path(__file__).parents[2] / "docs" / "backbones.md"
QUICK = ("inputs", "speech", "embeddings", "vision cache")
# Each does something that the others do not: tiles and outputs by row, features of inner layers, capped logits and
# tables of each layer, windows, a template that thinks.
WHOLE = ("smolvlm", "qwen3_vl", "gemma4", "internvl")


@pytest.mark.parametrize("check", QUICK)
@pytest.mark.parametrize("family", BUILDERS)
def test_every_family(family, check, tmp_path):
    assert is_good(run_check(family, check, tmp_path))


@pytest.mark.parametrize("check", [check for check in CHECKS if check not in QUICK])
@pytest.mark.parametrize("family", WHOLE)
def test_whole_families(family, check, tmp_path):
    assert is_good(run_check(family, check, tmp_path))


def test_the_documented_table_has_every_family_and_no_failure():
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = {line.split(" | ")[0][2:]: line for line in text.splitlines() if re.match(r"\| \w+ \| ok \|", line)}
    assert rows.keys() == BUILDERS.keys()
    for row in rows.values():
        cells = [cell.strip() for cell in row.split("|")[2:-2]]
        assert len(cells) == len(CHECKS) and all(is_good(cell) for cell in cells), row
    assert "crashed" not in text
    assert text.startswith(HEADER.partition("{columns}")[0])


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("florence2", "encoder-decoder"),
        ("paligemma", "attends to later tokens"),
        ("llama4", "Llama4ForConditionalGeneration is not supported: it has no base model"),
        ("mllama", "its base model has no `get_image_features`"),
        ("pi0", "does not say which part of it is the language model"),
        ("blip-2", "Blip2ForConditionalGeneration is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_sentence(model_type, message):
    config = AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        UniGDConfig(vlm_config=config)
        UniGDForConditionalGeneration.from_vlm(AutoModelForImageTextToText.from_config(config))


@pytest.mark.parametrize("model_type", ["step3p7", "gemma3"])
def test_configs_that_say_less_or_more_are_read(model_type):
    config = UniGDConfig(vlm_config=AutoConfig.for_model(model_type))
    assert isinstance(config.embedding_dim, int)


def test_a_processor_that_needs_images_is_refused():
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    image_processor.image_seq_length = 4
    processor = PaliGemmaProcessor(image_processor, make_tokenizer(["<image>"], bos="<bos>"), chat_template="x")
    with pytest.raises(ValueError, match="PaliGemmaProcessor is not supported: it processes no text without an image"):
        UniGDProcessor(processor)
