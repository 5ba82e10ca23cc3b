"""Folders of images with a file of metadata, of which that file alone is read."""

from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, load_dataset


_METADATA = {"metadata.jsonl": "json", "metadata.csv": "csv", "metadata.parquet": "parquet"}


def metadata_file(folder: Path, split: str) -> Path | None:
    """The metadata of a split of an image folder: that in its subfolder, or for `"train"` that in the folder itself,
    as `datasets` has it. None if there is none."""
    folders = [folder / split] if (folder / split).is_dir() else [folder] if split == "train" else []
    found = [each / name for each in folders for name in _METADATA if (each / name).is_file()]
    return found[0] if len(found) == 1 else None


def load_image_folder(metadata: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    """
    Loads the rows of a file of metadata. As in the ImageFolder of `datasets`, the column `file_name` becomes `image`,
    `file_names` becomes `images`, and `x_file_name` or `x_file_names` becomes `x`. The folder is not listed, as
    `datasets` does for each of its patterns, whenever the rows are loaded.

    Raises:
        ValueError: there is no column of file names, or one names a file outside the folder.
    """
    rows = load_dataset(_METADATA[metadata.name], data_files={split: str(metadata)}, split=split, streaming=streaming)
    features = rows.features or rows._resolve_features().features
    columns = {name: new for name in features if (new := _image_column(name))}
    if not columns:
        raise ValueError(f"{metadata} has no column `file_name`, only {', '.join(sorted(features))}.")
    made = {name: kind for name, kind in features.items() if name not in columns}
    made |= {new: List(Image()) if name.endswith("file_names") else Image() for name, new in columns.items()}
    settings: dict[str, Any] = {
        "batched": True,
        "remove_columns": list(columns),
        "fn_kwargs": {"folder": str(metadata.parent.absolute()), "columns": columns},
    }
    if streaming:  # the images of a stream are decoded if it is cast, and not if it is mapped to them
        return rows.map(_with_paths, **settings).cast(Features(made))
    return rows.map(_with_paths, features=Features(made), **settings)


def _image_column(name: str) -> str | None:
    for ending, new in (("file_name", "image"), ("file_names", "images")):
        if name == ending:
            return new
        if name.endswith(f"_{ending}"):
            return name.removesuffix(f"_{ending}")
    return None


def _with_paths(batch: dict[str, list[Any]], folder: str, columns: dict[str, str]) -> dict[str, list[Any]]:
    def path(name: str | None) -> dict[str, str | None] | None:
        if name is not None and (name.startswith("/") or ".." in name.split("/")):
            raise ValueError(f"{name} is outside the folder {folder}: `file_name` must be a path inside it.")
        return None if name is None else {"path": f"{folder}/{name}", "bytes": None}

    return {
        new: [list(map(path, value)) if isinstance(value, list) else path(value) for value in batch[name]]
        for name, new in columns.items()
    }
