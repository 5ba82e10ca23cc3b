"""The probe: a fixed input with its embedding and the logits after it, saved with a checkpoint.

By it, whoever loads the checkpoint can tell that it embeds and speaks as it did when it was saved.
"""

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file


PROBE_NAME = "probe.safetensors"
# Where to load from, as against what to load.
HUB_ARGUMENTS = {"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"}
_TEXT, _QUESTION = "A red cat and two blue dogs on the green grass.", "What is this?"
_INPUT = "input."


def probe_sequences() -> list:
    """A text, and a picture with a text. The picture is smooth: resizing differs by library at edges alone."""
    picture = Image.linear_gradient("L").resize((64, 64), Image.Resampling.BILINEAR)
    return [_TEXT, [Image.merge("RGB", (picture, picture.rotate(90), picture.rotate(180))), _QUESTION]]


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


def find_file(name: str | Path, file: str, kwargs: dict) -> str | None:
    """Path of a file of the checkpoint `name`, fetched where it has to be; None where there is none.

    Args:
        kwargs: Arguments of a `from_pretrained`, of which those that say where to load from are used.
    """
    return cached_file(
        name,
        file,
        **{key: kwargs[key] for key in HUB_ARGUMENTS & kwargs.keys() if kwargs[key] is not None},
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def commit_of(name: str | Path, kwargs: dict) -> str | None:
    """The commit of a Hub id that these arguments of a `from_pretrained` load; None for a folder."""
    config = find_file(name, "config.json", kwargs)
    snapshot = Path(config or "").parent
    return snapshot.name if snapshot.parent.name == "snapshots" else None


def load_probe(file: str | Path) -> dict[str, torch.Tensor]:
    return load_file(file)


@torch.no_grad()
def probe_difference(model, probe: dict[str, torch.Tensor]) -> float:
    """The largest distance, relative to its length, between a saved embedding or row of logits and what `model` makes
    of the same inputs."""
    distances = []
    for name, now in _outputs(model, probe).items():
        saved = probe[name]
        if saved.shape != now.shape:
            return float("inf")
        distances.append(((saved - now).norm(dim=1) / saved.norm(dim=1)).nan_to_num(nan=torch.inf).max().item())
    return max(distances)


def probe_tolerance(model, probe: dict[str, torch.Tensor]) -> float:
    """The distance that rounding may make, by the coarser of the data types then and now."""
    width = min(int(probe["dtype_width"]), int(_width(model.dtype)))
    return {8: 5e-2, 11: 1e-2}.get(width, 1e-4)


def processor_differences(processor, probe: dict[str, torch.Tensor]) -> list[str]:
    """What `processor` makes otherwise of [`probe_sequences`] than when the probe was saved; empty where nothing."""
    inputs = processor.process_sequences(probe_sequences(), padding_side="right")
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
    """Embeddings, and the logits at the last token of each row, float32 on the CPU."""
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
        hidden_states = model._decode(use_cache=False, **inputs).last_hidden_state
        at_last = hidden_states[torch.arange(len(last), device=last.device), last]
        outputs = {
            "embeddings": model._pool(hidden_states, mask, spans),
            "logits": model.get_output_embeddings()(at_last),
        }
        return {name: value.float().cpu() for name, value in outputs.items()}
    finally:
        model.train(was_training)


def _width(dtype: torch.dtype) -> torch.Tensor:
    """Bits of the significand."""
    return torch.tensor({torch.bfloat16: 8, torch.float16: 11}.get(dtype, 24))
