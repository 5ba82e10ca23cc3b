"""An adapter and the model beneath it, merged into a checkpoint of its own."""

from pathlib import Path

from ..modeling.adapter_unigd import is_adapter
from .loading import load_checkpoint


def merge_adapter(name: str, output: str | Path, **kwargs) -> None:
    """
    Merges an adapter (LoRA, soft prompts, head) into the model that it names, and saves a normal checkpoint.

    Args:
        name: Hub id or folder of the adapter.
        output: Folder to write, new or empty.
        kwargs: For `from_pretrained` of the model. The merge is exact in `dtype="float32"`; in 16 bits the sum of
            weights is rounded to them.

    Raises:
        ValueError: `name` is no adapter.
        FileExistsError: `output` holds files.
    """
    if not is_adapter(name, kwargs):
        raise ValueError(f"{name} holds no adapter (adapter_config.json): there is nothing to merge.")
    folder = new_folder(output)
    model, _ = load_checkpoint(name, **kwargs)
    model.save_pretrained(folder)


def new_folder(path: str | Path) -> Path:
    """
    Makes sure that what is written to `path` is all that is there.

    Raises:
        FileExistsError: it holds files.
    """
    folder = Path(path)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Name a new folder with `--output`, or empty this one.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
