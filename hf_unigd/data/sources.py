"""Loads rows from the Hub, from files, or from the offline sources."""

from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from .icons import load_icons
from .stories import load_stories


def load_rows(
    name: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    rename_columns: dict[str, str] | None = None,
) -> Dataset | IterableDataset:
    """
    Loads one split of a dataset.

    Args:
        name: `"icons"` or `"stories"` for the offline sources, a folder written by `save_to_disk`, or anything that
            `datasets.load_dataset` takes: a Hub id, a folder, or a `.json`, `.jsonl`, `.csv` or `.parquet` file.
        config: Name of the dataset configuration. It is used only for what `load_dataset` loads by a Hub id or folder.
        split: Name of the split.
        streaming: Return a streaming dataset instead of downloading all rows first. The offline sources ignore it.
        rename_columns: Maps old column names to new ones.

    Raises:
        ValueError: the split does not exist, or a column to rename does not exist.
    """
    rows = _load(name, config, split, streaming)
    return rows.rename_columns(rename_columns) if rename_columns else rows


def _load(name, config, split, streaming):
    path = Path(name)
    if name == "icons":
        return load_icons(split)
    if name == "stories":
        return load_stories(split)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = load_from_disk(name)
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise ValueError(f"{name} has no split {split!r}, only {sorted(loaded)}.")
            loaded = loaded[split]
        return loaded.to_iterable_dataset() if streaming else loaded
    if path.is_file():
        builder = {".jsonl": "json"}.get(path.suffix, path.suffix.lstrip("."))
        return load_dataset(builder, data_files={split: name}, split=split, streaming=streaming)
    return load_dataset(name, config, split=split, streaming=streaming)
