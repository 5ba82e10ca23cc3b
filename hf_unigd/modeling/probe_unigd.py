"""The probe: a fixed input with its embedding and the logits after it, saved with a checkpoint.

By it, whoever loads the checkpoint can tell that it embeds and speaks as it did when it was saved.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file


PROBE_NAME = "probe.safetensors"
_TEXT, _QUESTION = "A red cat and two blue dogs on the green grass.", "What is this?"
_INPUT = "input."


def probe_sequences() -> list:
    """A text, a picture with a text, and the picture alone, which older probes have not.

    The picture is smooth: resizing differs by library at edges alone.
    """
    grey = Image.linear_gradient("L").resize((64, 64), Image.Resampling.BILINEAR)
    picture = Image.merge("RGB", (grey, grey.rotate(90), grey.rotate(180)))
    return [_TEXT, [picture, _QUESTION], [picture]]


@torch.no_grad()
def make_probe(model, processor) -> dict[str, torch.Tensor]:
    """What a probe file holds: the inputs that `processor` makes of [`probe_sequences`], and what comes of them.

    Args:
        model ([`UniGDPreTrainedModel`]): Runs them, in eval mode.
        processor ([`UniGDProcessor`]): Makes the inputs.
    """
    inputs = processor.process_sequences(probe_sequences(), padding_side="right")
    tensors = {f"{_INPUT}{name}": value.contiguous() for name, value in inputs.items()}
    return {**tensors, **_outputs(model, tensors), "dtype_width": _width(model.dtype)}


def save_probe(model, processor, folder: str | Path) -> None:
    """Writes the probe of a model and its processor beside them."""
    save_file(make_probe(model, processor), Path(folder) / PROBE_NAME, metadata={"format": "pt"})


def load_probe(file: str | Path) -> dict[str, torch.Tensor]:
    return load_file(file)


@torch.no_grad()
def probe_differences(model, probe: dict[str, torch.Tensor]) -> dict[str, float]:
    """By output, the largest distance, relative to its length, between a saved row and what `model` makes of the same
    inputs."""
    outputs = _outputs(model, probe)
    if "inverse_temperature" not in probe:  # an older probe
        del outputs["inverse_temperature"]
    differences = {}
    for name, now in outputs.items():
        saved = probe[name]
        if saved.shape == now.shape:
            distances = (saved - now).norm(dim=1) / saved.norm(dim=1)
            differences[name] = distances.nan_to_num(nan=torch.inf).max().item()
        else:
            differences[name] = float("inf")
    return differences


def probe_difference(model, probe: dict[str, torch.Tensor]) -> float:
    """The largest of [`probe_differences`]."""
    return max(probe_differences(model, probe).values())


def probe_tolerance(model, probe: dict[str, torch.Tensor]) -> float:
    """The distance that rounding may make, by the coarser of the data types then and now."""
    width = min(int(probe["dtype_width"]), int(_width(model.dtype)))
    return {8: 5e-2, 11: 1e-2}.get(width, 1e-4)


def processor_differences(processor, probe: dict[str, torch.Tensor]) -> list[str]:
    """What `processor` makes otherwise of [`probe_sequences`] than when the probe was saved; empty where nothing."""
    rows = len(probe[f"{_INPUT}input_ids"])
    inputs = processor.process_sequences(probe_sequences()[:rows], padding_side="right")
    saved = {name.removeprefix(_INPUT): value for name, value in probe.items() if name.startswith(_INPUT)}
    if saved.keys() != inputs.keys():
        return [f"inputs {sorted(inputs)}, they were {sorted(saved)}"]
    differences = []
    for name, value in saved.items():
        now = inputs[name]
        if value.shape != now.shape:
            differences.append(f"{name} of shape {tuple(now.shape)}, it was {tuple(value.shape)}")
        elif value.is_floating_point():
            if (value - now).abs().max() > 0.1:  # of normalised pixels; libraries resize differently
                differences.append(f"{name} differ by {(value - now).abs().max():.2f}")
        elif not torch.equal(value, now):
            row = int((value != now).nonzero()[0, 0])
            differences.append(f"{name} of row {row} differ")
    return differences


def _outputs(model, tensors) -> dict[str, torch.Tensor]:
    """Embeddings, the logits at the last token of each row, and the logit scale, float32 on the CPU."""
    inputs = {
        name.removeprefix(_INPUT): value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in tensors.items()
        if name.startswith(_INPUT)
    }
    spans, mask = inputs.pop("spans"), inputs["attention_mask"]
    last = mask.sum(1) - 1
    was_training = model.training
    model.eval()
    try:
        with _full_float32():
            hidden_states = model._decode(use_cache=False, **inputs).last_hidden_state
            at_last = hidden_states[torch.arange(len(last), device=last.device), last]
            outputs = {
                "embeddings": model._pool(hidden_states, mask, spans),
                "logits": model.get_output_embeddings()(at_last),
                # As it multiplies: never zero, so that a distance relative to it can be told.
                "inverse_temperature": model.embedding_head.inverse_temperature.reshape(1, 1),
            }
        return {name: value.float().cpu() for name, value in outputs.items()}
    finally:
        model.train(was_training)


@contextmanager
def _full_float32():
    """Without TF32 and bfloat16 in place of float32, which round by more than a float32 probe tolerates."""
    # By operation: unlike `allow_tf32`, these can be read and restored whichever of torch's two ways set them.
    backends: Any = torch.backends  # whose types lack some
    operations = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision


def _width(dtype: torch.dtype) -> torch.Tensor:
    """Bits of the significand."""
    return torch.tensor({torch.bfloat16: 8, torch.float16: 11}.get(dtype, 24))
