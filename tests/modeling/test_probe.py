"""The probe: written with a checkpoint, reproduced by every load, and never another model's."""

import copy
import logging
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_unigd import UniGDForConditionalGeneration, UniGDModel, UniGDProcessor
from hf_unigd.modeling.probe_unigd import (
    PROBE_NAME,
    load_probe,
    make_probe,
    probe_difference,
    probe_sequences,
    probe_tolerance,
    processor_differences,
)
from tiny_adapters import make_adapter
from tiny_models import FAMILIES, make_vlm


def make_model(family="llava", **kwargs):
    tiny = make_vlm(family)
    torch.manual_seed(0)
    model = UniGDForConditionalGeneration.from_vlm(tiny.model, head_type="linear", embedding_dim=8, **kwargs)
    model.processor = UniGDProcessor(tiny.processor)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probe_holds_what_the_model_makes_of_a_text_and_an_image(family):
    model = make_model(family)
    probe = make_probe(model, model.processor)
    with torch.no_grad():
        expected = model.embed(**model.processor.process_sequences(probe_sequences(), padding_side="right"))
    assert torch.equal(probe["embeddings"], expected)
    assert probe_difference(model, probe) == 0
    assert processor_differences(model.processor, probe) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_tolerated_and_other_changes_are_not(tmp_path, dtype):
    model = make_model()
    model.vlm.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(tmp_path)
    for loaded_as in (torch.float32, dtype):
        UniGDModel.from_pretrained(tmp_path, dtype=loaded_as)
    probe = load_probe(tmp_path / PROBE_NAME)
    assert probe_tolerance(model, probe) == {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-4}[dtype]
    model.vlm.get_input_embeddings().weight.data *= -1
    assert probe_difference(model, probe) > probe_tolerance(model, probe)


def test_a_probe_that_lacks_an_output_is_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    probe = load_probe(tmp_path / PROBE_NAME)
    del probe["inverse_temperature"]
    save_file(probe, tmp_path / PROBE_NAME)
    with pytest.raises(RuntimeError, match="its probe is off by inf"):
        UniGDModel.from_pretrained(tmp_path)


def state_of(model):
    """Which object every attribute of every module is, and every entry of those that are dicts."""
    state = {}
    for place, module in enumerate(model.modules()):
        for name, value in vars(module).items():
            state[place, name] = id(value)
            for key, entry in value.items() if isinstance(value, dict) else []:
                state[place, name, key] = id(entry)
    return state


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probe_leaves_the_model_as_it_was(family):
    model = make_model(family).train()
    model.vlm.get_input_embeddings().eval()  # as a frozen part in training
    model.embedding_head.register_forward_hook(lambda *_: None)
    before = state_of(model)
    make_probe(model, model.processor)
    assert state_of(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_can_be_pickled_and_copied_whatever_it_has_run(family, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    model = UniGDForConditionalGeneration.from_pretrained(tmp_path)
    pickle.dumps(model.vlm)  # a forward pass on images leaves hooks of transformers there; the probe does not
    batch = UniGDProcessor(make_vlm(family).processor).process_sequences(probe_sequences())
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model):
        with torch.no_grad():
            outputs = other(**batch, output_hidden_states=True)
        assert torch.equal(outputs.embeddings, expected.embeddings)
        for now, before in zip(outputs.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(now, before)


def set_nothing():
    pass


def set_by_flags():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def set_by_precision():
    torch.set_float32_matmul_precision("medium")


def set_by_operation():
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"


@pytest.mark.parametrize("by", [set_nothing, set_by_flags, set_by_precision, set_by_operation])
def test_a_probe_is_computed_in_full_float32_and_leaves_the_flags_alone(by):
    backends = torch.backends
    operations = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
    model, seen = make_model(), []

    def read():
        return [operation.fp32_precision for operation in operations]

    model.embedding_head.register_forward_hook(lambda *_: seen.append(read()))
    original = read()
    try:
        by()
        before = read()
        make_probe(model, model.processor)
        assert read() == before
        assert seen == [["ieee"] * 4]
    finally:
        torch.set_float32_matmul_precision("highest")
        for operation, precision in zip(operations, original, strict=True):
            operation.fp32_precision = precision


def test_saving_loads_what_was_written(tmp_path, monkeypatch):
    model = make_model()

    def lossy(self, folder, *args, **kwargs):
        model.embedding_head.projection.bias.data += 1  # as if what is written were not what is in memory
        save(self, folder, *args, **kwargs)
        model.embedding_head.projection.bias.data -= 1

    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lossy)
    with pytest.raises(RuntimeError, match="does not compute what it did when it was saved"):
        model.save_pretrained(tmp_path / "a")
    model.verify_saves = False
    model.save_pretrained(tmp_path / "b")


@pytest.mark.parametrize("is_adapter", [False, True])
@pytest.mark.parametrize("has_memory", [True, False])
def test_a_save_is_verified_on_the_models_device(tmp_path, is_adapter, has_memory):
    """The device stands for an accelerator. What is loaded for it is put on the CPU, through a device map as there."""
    if is_adapter:
        model, folder = make_adapter(tmp_path, on="ours")[0], tmp_path / "adapter"
    else:
        model, folder = make_model(), tmp_path
        model.save_pretrained(folder)
    maps = []

    class OnDevice(UniGDForConditionalGeneration):
        device = torch.device("cuda", 1)

        @classmethod
        def from_pretrained(cls, name, *, device_map=None, **kwargs):
            maps.append(device_map)
            if device_map is not None and not has_memory:
                raise torch.OutOfMemoryError("out of memory")
            whole = UniGDForConditionalGeneration.from_pretrained(name, device_map=device_map and "cpu", **kwargs)
            assert isinstance(whole, UniGDForConditionalGeneration) and whole.dtype == model.dtype

    model.__class__ = OnDevice
    model._verify_save(folder)
    on_device = {"": torch.device("cuda", 1)}
    assert maps == ([on_device] if has_memory else [on_device, None])


def test_a_loaded_model_is_saved_with_the_processor_of_its_checkpoint(tmp_path):
    make_model().save_pretrained(tmp_path / "a")
    loaded = UniGDModel.from_pretrained(tmp_path / "a")
    assert loaded.processor is None
    loaded.save_pretrained(tmp_path / "b")
    for name in ("processor_config.json", PROBE_NAME, "modules.json", "sentence_unigd.py"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_without_a_processor_a_save_says_what_it_lacks(tmp_path, caplog):
    model = make_model()
    model.processor = None
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
    assert "Set `model.processor`" in caplog.text
    assert not (tmp_path / PROBE_NAME).exists()
    UniGDModel.from_pretrained(tmp_path)


def test_another_processor_removes_the_probe_and_says_so(tmp_path, caplog):
    model = make_model()
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    assert (tmp_path / PROBE_NAME).exists()
    other = UniGDProcessor(model.processor.vlm_processor, prompts={"text": "What is it about"})
    with caplog.at_level(logging.WARNING):
        other.save_pretrained(tmp_path)
    assert "belongs to another processor" in caplog.text
    assert UniGDProcessor.from_pretrained(tmp_path).prompts["text"] == "What is it about"


def test_saving_does_not_change_the_models_mode_or_gradients(tmp_path):
    model = make_model().train()
    model.save_pretrained(tmp_path)
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert set(load_file(tmp_path / PROBE_NAME)) >= {"embeddings", "input.input_ids", "input.pixel_values"}
