"""Loads rows from the Hub, from files, or from the offline sources."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from ..inputs import reading
from .coco import coco_rows, is_coco
from .icons import load_icons
from .image_folder import load_image_folder, metadata_file
from .scenes import CONFIGURATIONS, load_scenes
from .stories import load_stories


# The builders of `datasets` for files, by how their names end.
BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
}
# Each is called with the name of the split.
OFFLINE: dict[str, Callable[[str], Dataset]] = {
    "icons": load_icons,
    "stories": load_stories,
    "scenes": load_scenes,
    **{f"scenes/{each}": partial(load_scenes, configuration=each) for each in CONFIGURATIONS},
}
# Streams of rows that are on disk are cut into as many parts, for processes and data loader workers to share.
_SHARDS = 64
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")


def load_rows(
    name: str | Sequence[str],
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    rename_columns: dict[str, str] | None = None,
    data_files: str | list[str] | dict[str, str] | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
) -> Dataset | IterableDataset:
    """
    Loads one split of a dataset.

    Args:
        name: `"icons"`, `"stories"`, `"scenes"` or `"scenes/CONFIGURATION"` for the offline sources
            ([`~hf_unigd.data.load_scenes`]), a folder written by `save_to_disk`, anything that
            `datasets.load_dataset` takes (a Hub id or a folder), or files: one, several in a list, or all of a pattern
            such as `data/*.tar` or `data/cc3m-{000..331}.tar`. Files are `.json` (COCO's captions among them),
            `.jsonl`, `.csv`, `.parquet`, `.arrow`, or `.tar` in the format of WebDataset.
        config: Name of the dataset configuration. It is used only for what `load_dataset` loads by a Hub id or folder.
        split: Name of the split.
        streaming: Return a streaming dataset instead of downloading all rows first. The offline sources ignore it.
        rename_columns: Maps old column names to new ones.
        data_files, data_dir: As in `datasets.load_dataset`, for what it loads by name.
        revision: Commit, branch or tag of a dataset of the Hub.

    Raises:
        ValueError: the split does not exist, a column to rename does not exist, or a file or folder cannot be read.
    """
    with reading(name if isinstance(name, str) else ", ".join(name)):
        try:
            rows = _load(name, config, split, streaming, data_files, data_dir, revision)
        except DatasetGenerationError as error:  # which says that an error occurred
            raise error.__cause__ or error from error
    return rows.rename_columns(rename_columns) if rename_columns else rows


def _load(name, config, split, streaming, data_files, data_dir, revision):
    if not isinstance(name, str):
        return _load_files(list(name), split, streaming)
    path = Path(name)
    if data_files is not None or data_dir is not None:
        files = {"data_dir": data_dir, "data_files": data_files}
        return load_dataset(name, config, **files, split=split, streaming=streaming, revision=revision)
    if name in OFFLINE:
        return OFFLINE[name](split)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = load_from_disk(name)
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise ValueError(f"it has no split {split!r}, only {sorted(loaded)}.")
            loaded = loaded[split]
        return _as_stream(loaded) if streaming else loaded
    if path.is_file() or (_is_pattern(name) and not path.is_dir()):
        return _load_files([name], split, streaming)
    metadata = metadata_file(path, split) if config is None else None
    if metadata is not None:
        return load_image_folder(metadata, split, streaming)
    return load_dataset(name, config, split=split, streaming=streaming, revision=revision)


def _load_files(names: list[str], split: str, streaming: bool) -> Dataset | IterableDataset:
    """Loads files and patterns of files, which all have the same suffix."""
    suffixes = {Path(name).suffix for name in names}
    if not suffixes <= BUILDERS.keys():
        raise ValueError(f"its name must end in {', '.join(BUILDERS)}.")
    builders = {BUILDERS[suffix] for suffix in suffixes}
    if len(builders) != 1:
        raise ValueError(f"one kind of file at a time can be read, not {', '.join(sorted(suffixes))} together.")
    files = [file for name in names for file in _numbered(name)]
    for file in files:
        if Path(file).is_file() and Path(file).stat().st_size == 0:
            raise ValueError(f"{file}: the file is empty, it holds no rows.")
    # `datasets` reads a list or an object of JSON whole in each pass of a stream, and not with its mixed types.
    is_document = ".json" in suffixes
    rows = load_dataset(*builders, data_files={split: files}, split=split, streaming=streaming and not is_document)
    if is_document:
        rows = coco_rows(rows) if is_coco(rows) else rows
        return _as_stream(rows) if streaming else rows
    return rows


def _as_stream(rows: Dataset) -> IterableDataset:
    return rows.to_iterable_dataset(num_shards=max(1, min(_SHARDS, len(rows))))


def _is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[{")


def _numbered(name: str) -> list[str]:
    """The files of a pattern with numbers such as `{000..331}`, which WebDataset's users write. `datasets` knows the
    other patterns."""
    found = _NUMBERS.search(name)
    if found is None:
        return [name]
    first, last = found.groups()
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [file for number in numbers for file in _numbered(name[: found.start()] + number + name[found.end() :])]
