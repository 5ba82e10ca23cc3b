"""Where a checkpoint may be saved: not among the weights of another model."""

import re
from pathlib import Path

from .hub_files_unigd import read_json
from .probe_unigd import PROBE_NAME


# What tells models apart in their configs. Soft prompts change the size of the vocabulary.
_SHAPE = re.compile(r"(.*_)?(type|size|dim|layers|heads|depth)")
_NO_SHAPE = "vocab_size"


def check_save_folder(folder: str | Path, config, is_adapter: bool) -> None:
    """
    To be called before a checkpoint is saved. A folder without weights is right, whatever else it holds: the
    checkpoints and logs of a run, a card. So is one with an earlier save of this model, which is overwritten: of the
    same kind, whole model or adapter, with the same head, family of the backbone, and sizes. Models that differ in
    nothing but the values of their weights cannot be told apart.

    Args:
        folder (`str` or `os.PathLike`): The folder, which need not exist.
        config ([`UniGDConfig`]): The model's.
        is_adapter (`bool`): Whether an adapter will be saved, instead of a whole model.

    Raises:
        FileExistsError: the folder holds the weights or the adapter of another model.
    """
    folder = Path(folder)
    adapters = _names(folder, "adapter_config.json", "adapter_model.*")
    weights = _names(folder, "*.safetensors", "pytorch_model*.bin") - {*adapters, PROBE_NAME}
    same_kind, other_kind = (adapters, weights) if is_adapter else (weights, adapters)
    if other_kind:
        reason = f"a whole model ({min(weights)})" if is_adapter else f"an adapter ({min(adapters)})"
    elif same_kind and (difference := _difference(folder, config)):
        reason = f"another model ({min(same_kind)}; {difference})"
    else:
        return
    raise FileExistsError(
        f"{folder} holds {reason}, so {'an adapter' if is_adapter else 'a whole model'} is not saved there: the files "
        "of both would be mixed. Nothing was written. Name another folder, or empty this one."
    )


def _names(folder: Path, *patterns: str) -> set[str]:
    return {file.name for pattern in patterns for file in folder.glob(pattern)}


def _difference(folder: Path, config) -> str | None:
    """The first value by which the saved config is that of another model, in words."""
    try:
        saved = read_json(folder / "config.json")
    except (OSError, ValueError):
        return "without a config.json"
    shapes, saved_shapes = _shapes(config.to_dict()), _shapes(saved)
    if saved.get("model_type") != config.model_type:
        return f"`model_type` is {saved.get('model_type')!r}"
    for key in shapes:
        if saved_shapes.get(key, shapes[key]) != shapes[key]:
            return f"`{key}` is {saved_shapes[key]!r}, and that of the model to save is {shapes[key]!r}"
    return None


def _shapes(config: dict, prefix: str = "") -> dict[str, object]:
    shapes: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            shapes |= _shapes(value, f"{prefix}{key}.")
        elif _SHAPE.fullmatch(str(key)) and key != _NO_SHAPE:
            shapes[f"{prefix}{key}"] = value
    return shapes
