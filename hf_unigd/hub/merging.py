"""Merging an adapter into its base model, as a checkpoint of its own."""

from pathlib import Path

from ..inputs import reading
from ..modeling.hub_files_unigd import is_adapter
from ..outputs import new_folder
from .loading import load_checkpoint


def merge_adapter(name: str, output: str | Path, **kwargs) -> None:
    """
    Merges an adapter (LoRA, soft prompts, head) into the base model that it names, and saves a whole checkpoint.

    Args:
        name: Hub id or folder of the adapter.
        output: Folder to write, new or empty.
        kwargs: Arguments of the model's `from_pretrained`. The merge is exact with `dtype="float32"`; in 16 bits, the
            merged weights are rounded.

    Raises:
        ValueError: `name` is no adapter.
        FileExistsError: `output` holds files.
    """
    with reading(name):
        is_mergeable = is_adapter(name, kwargs)
    if not is_mergeable:
        raise ValueError(f"{name} holds no adapter (adapter_config.json): there is nothing to merge.")
    with new_folder(output) as folder:
        model, _ = load_checkpoint(name, **kwargs)
        model.save_pretrained(folder)
