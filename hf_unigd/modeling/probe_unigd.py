"""The probe: a fixed input with its embeddings and the logits after it, saved with a checkpoint.

Whoever loads the checkpoint can run the probe and compare: the model must embed and generate as when it was saved.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


PROBE_NAME = "probe.safetensors"
_TEXT, _QUESTION = "A red cat and two blue dogs on the green grass.", "What is this?"
_INPUT = "input."


def probe_sequences() -> list:
    """A text, an image with a text, and the image alone.

    The image is smooth, because libraries resize differently at edges only.
    """
    grey = Image.linear_gradient("L").resize((64, 64), Image.Resampling.BILINEAR)
    image = Image.merge("RGB", (grey, grey.rotate(90), grey.rotate(180)))
    return [_TEXT, [image, _QUESTION], [image]]


@torch.no_grad()
def make_probe(model, processor) -> dict[str, torch.Tensor]:
    """
    Makes what a probe file holds: the inputs that `processor` makes of [`probe_sequences`], and what `model` makes of
    these inputs. The model is left as it was.

    Args:
        model ([`UniGDPreTrainedModel`]): Runs the inputs, in eval mode.
        processor ([`UniGDProcessor`]): Makes the inputs.

    Returns:
        `dict[str, torch.Tensor]` on the CPU: the inputs by name, `embeddings` `(n, embedding_dim)`, `logits`
        `(n, vocab_size)` at the last token of each sequence, `inverse_temperature` `(1, 1)` (all float32), and
        `dtype_width` `()`, the significand bits of the model's data type. `n` is 3 and the number of instructions.
    """
    inputs = _inputs(processor)
    tensors = {f"{_INPUT}{name}": value.contiguous() for name, value in inputs.items()}
    return {**tensors, **_outputs(model, tensors), "dtype_width": torch.tensor(significand_bits(model.dtype))}


def save_probe(model, processor, folder: str | Path) -> None:
    """Writes the probe of a model and its processor into their folder."""
    save_file(make_probe(model, processor), Path(folder) / PROBE_NAME, metadata={"format": "pt"})


def load_probe(file: str | Path) -> dict[str, torch.Tensor]:
    """
    Reads what [`save_probe`] wrote.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}. Save or download the checkpoint again.") from error


@torch.no_grad()
def probe_differences(model, probe: dict[str, torch.Tensor]) -> dict[str, float]:
    """
    Compares a model's outputs for the saved inputs with the saved outputs.

    Returns:
        `dict[str, float]`: for each output, the largest distance between a row now and the same row when it was saved,
        relative to the length of the saved row. Infinite if the probe lacks the output or has it in another shape.
    """
    differences = {}
    for name, now in _outputs(model, probe).items():
        saved = probe.get(name)
        if saved is not None and saved.shape == now.shape:
            distances = (saved - now).norm(dim=1) / saved.norm(dim=1)
            differences[name] = distances.nan_to_num(nan=torch.inf).max().item()
        else:
            differences[name] = float("inf")
    return differences


def probe_difference(model, probe: dict[str, torch.Tensor]) -> float:
    """The largest of [`probe_differences`]."""
    return max(probe_differences(model, probe).values())


def probe_tolerance(model, probe: dict[str, torch.Tensor]) -> float:
    """The largest [`probe_difference`] that rounding explains, in the data types of the model and of the probe."""
    return rounding_tolerance(int(probe["dtype_width"]), significand_bits(model.dtype))


def rounding_tolerance(*widths: int) -> float:
    """The relative distance that rounding explains between outputs of the same weights, computed in several data types
    of these [`significand_bits`]. The coarsest decides."""
    return {8: 5e-2, 11: 1e-2}.get(min(widths), 1e-4)


def significand_bits(dtype: torch.dtype) -> int:
    """The precision of a floating-point data type in bits; finer ones than float32 count as float32."""
    return {torch.bfloat16: 8, torch.float16: 11}.get(dtype, 24)


def processor_differences(processor, probe: dict[str, torch.Tensor]) -> list[str]:
    """Compares the inputs that `processor` makes of [`probe_sequences`] with the saved ones, and describes each
    difference; the list is empty if there is none."""
    inputs = _inputs(processor)
    saved = {name.removeprefix(_INPUT): value for name, value in probe.items() if name.startswith(_INPUT)}
    if saved.keys() != inputs.keys():
        return [f"the inputs are {sorted(inputs)}, they were {sorted(saved)}"]
    differences = []
    for name, value in saved.items():
        now = inputs[name]
        if value.shape != now.shape:
            differences.append(f"{name} of shape {tuple(now.shape)}, it was {tuple(value.shape)}")
        elif value.is_floating_point():
            difference = (value - now).abs().nan_to_num(nan=torch.inf).max()
            if difference > 0.1:  # of normalised pixels, as libraries resize differently
                differences.append(f"{name} differ by {difference:.2f}")
        elif not torch.equal(value, now):
            row = int((value != now).nonzero()[0, 0])
            differences.append(f"{name} of row {row} differ")
    return differences


def _inputs(processor):
    """The inputs of the probe sequences, and of the text with each of the instructions."""
    sequences = probe_sequences()
    instructions = [None] * len(sequences) + [text for _, text in sorted(processor.instructions.items())]
    sequences += [_TEXT] * len(processor.instructions)
    return processor.process_sequences(sequences, instruction=instructions, padding_side="right")


def _outputs(model, tensors) -> dict[str, torch.Tensor]:
    """Embeddings, the logits at the last token of each row, and the inverse temperature, float32 on the CPU."""
    inputs = {
        name.removeprefix(_INPUT): value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in tensors.items()
        if name.startswith(_INPUT)
    }
    spans, mask = inputs.pop("spans"), inputs["attention_mask"]
    last = mask.sum(1) - 1
    with _left_as_found(model), _full_float32():
        model.eval()
        hidden_states = model._decode(use_cache=False, **inputs).last_hidden_state
        at_last = hidden_states[torch.arange(len(last), device=last.device), last]
        outputs = {
            "embeddings": model._pool(hidden_states, mask, spans),
            "logits": model.logits(at_last),
            # Not its logarithm, which may be zero: a relative distance would be infinite.
            "inverse_temperature": model.embedding_head.inverse_temperature.reshape(1, 1),
        }
    return {name: value.float().cpu() for name, value in outputs.items()}


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """
    Puts back every attribute of every module, and every entry of those that are dicts (hooks, buffers).

    A forward pass changes more than modes: transformers installs hooks to capture outputs, and because they are local
    functions, a model that has them cannot be pickled.
    """
    modules = [(module, dict(vars(module))) for module in model.modules()]
    dicts = [(value, dict(value)) for _, found in modules for value in found.values() if isinstance(value, dict)]
    try:
        yield
    finally:
        for changed, found in [*((vars(module), found) for module, found in modules), *dicts]:
            changed.clear()
            changed.update(found)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Computes float32 without TF32 or bfloat16 inside, which round by more than the tolerance of a float32 probe."""
    # By operation: unlike `allow_tf32`, these can be read and restored whichever of torch's two ways set them.
    backends: Any = torch.backends  # the type stubs lack some of these
    operations = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision
