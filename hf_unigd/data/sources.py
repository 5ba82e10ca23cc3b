"""Loads rows from the Hub, from files, or from the offline sources."""

from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from ..inputs import reading
from .icons import load_icons
from .stories import load_stories


# The builders of `datasets` for files, by how their names end.
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


def load_rows(
    name: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    rename_columns: dict[str, str] | None = None,
    data_files: str | list[str] | dict[str, str] | None = None,
    data_dir: str | None = None,
) -> Dataset | IterableDataset:
    """
    Loads one split of a dataset.

    Args:
        name: `"icons"` or `"stories"` for the offline sources, a folder written by `save_to_disk`, or anything that
            `datasets.load_dataset` takes: a Hub id, a folder, or a `.json`, `.jsonl`, `.csv`, `.parquet` or `.arrow`
            file.
        config: Name of the dataset configuration. It is used only for what `load_dataset` loads by a Hub id or folder.
        split: Name of the split.
        streaming: Return a streaming dataset instead of downloading all rows first. The offline sources ignore it.
        rename_columns: Maps old column names to new ones.
        data_files, data_dir: As in `datasets.load_dataset`, for what it loads by name.

    Raises:
        ValueError: the split does not exist, a column to rename does not exist, or a file or folder cannot be read.
    """
    with reading(name):
        try:
            rows = _load(name, config, split, streaming, data_files, data_dir)
        except DatasetGenerationError as error:  # which says that an error occurred
            raise error.__cause__ or error from error
    return rows.rename_columns(rename_columns) if rename_columns else rows


def _load(name, config, split, streaming, data_files, data_dir):
    path = Path(name)
    if data_files is not None or data_dir is not None:
        return load_dataset(name, config, data_dir=data_dir, data_files=data_files, split=split, streaming=streaming)
    if name == "icons":
        return load_icons(split)
    if name == "stories":
        return load_stories(split)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = load_from_disk(name)
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise ValueError(f"it has no split {split!r}, only {sorted(loaded)}.")
            loaded = loaded[split]
        return loaded.to_iterable_dataset() if streaming else loaded
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"its name must end in {', '.join(BUILDERS)}.")
        if path.stat().st_size == 0:
            raise ValueError("the file is empty, it holds no rows.")
        return load_dataset(BUILDERS[path.suffix], data_files={split: name}, split=split, streaming=streaming)
    return load_dataset(name, config, split=split, streaming=streaming)
