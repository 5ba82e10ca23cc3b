"""Numbers and templates from files that would take all memory are refused before anything is made of them."""

import json
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_unigd import UniGDConfig, UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.modeling.plausible_unigd import as_large_as, check_sizes
from tiny_models import make_vlm


def build(layers, width=4):
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


@pytest.fixture
def file(tmp_path):
    save_file(
        {name: value.clone() for name, value in nn.Linear(4, 4).state_dict().items()}, tmp_path / "x.safetensors"
    )
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("settings", [{"layers": 100}, {"layers": 1, "width": 10**9}])
def test_a_model_that_is_much_larger_than_its_files_is_not_built(file, settings):
    with (
        pytest.raises(
            ValueError, match="checkpoint holds 2 tensors of 20 elements, but its config asks for many more"
        ),
        as_large_as("checkpoint", [file]),
    ):
        build(**settings)
    build(100)  # outside the context


def test_what_belongs_to_the_files_is_built(file):
    with as_large_as("checkpoint", [file]):
        model = build(2)
        for layer in model:  # as loading does, which replaces tensors
            layer.weight = nn.Parameter(torch.zeros(4, 4))
            layer.weight = nn.Parameter(torch.zeros(4, 4))
        other = threading.Thread(target=build, args=(100,))
        other.start()
        other.join()
    with as_large_as("checkpoint without safetensors", []):
        build(100)


def test_a_damaged_file_is_named(file):
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged"), as_large_as("checkpoint", [file]):
        pass


def test_numbers_that_are_no_sizes_may_be_large():
    check_sizes("config", {"rope_parameters": {"rope_theta": 10**8}, "bos_token_id": 150_000, "scale": 1e30})
    check_sizes("config", {"max_pixels": 1 << 24, "size": {"longest_edge": 1 << 24}}, largest=1000)
    for config in ({"a": {"b": [{"c": 10**9}]}}, {"size": {"height": 20_000, "width": 20_000}}):
        with pytest.raises(ValueError, match=r"`config\.(a\.b\.c|size\.height \* width)` is \d+, which is larger"):
            check_sizes("config", config)


@pytest.mark.parametrize("vlm_config", [[], "llava", 5, {"model_type": "unigd"}, {"model_type": "nothing"}, {}])
def test_what_is_no_backbones_config_is_refused(vlm_config):
    with pytest.raises(ValueError, match="`vlm_config`"):
        UniGDConfig(vlm_config=vlm_config)


def test_a_processor_with_huge_numbers_is_refused(llava, tmp_path):
    llava[1].save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_additional_image_tokens": 10**7}))
    with pytest.raises(ValueError, match=r"`processor_config\.json\.num_additional_image_tokens` is 10000000"):
        UniGDProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("template", ["{{ 'a' * 2000000 }}", "{{ 1 / 0 }}", "{% for x in y %}", "{{ messages.x.y }}"])
def test_a_template_that_cannot_be_rendered_or_writes_too_much_is_refused(template):
    processor = make_vlm().processor
    processor.chat_template = template
    with pytest.raises(ValueError, match="The chat template cannot be rendered for an image and a text"):
        UniGDProcessor(processor)


def test_loading_names_the_checkpoint_whatever_is_wrong_with_its_config(llava, tmp_path):
    llava[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in (("dtype", "x"), ("logit_scale_init_value", []), ("checkpoint_format", None)):
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(ValueError, match=rf"{tmp_path}|format None"):
            UniGDForConditionalGeneration.from_pretrained(tmp_path)
