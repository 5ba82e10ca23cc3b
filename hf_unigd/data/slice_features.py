"""What the teachers see of a dataset's slices, computed once and kept on disk beside the data.

A folder holds `teachers.json` (what the features depend on) and parts of so many rows each, written whole or not at
all. Of a part, `features` has one row for each image or sentence that no part before it has, in half precision, and
`rows` says for each row of the data which of all these it is made of.
"""

import json
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets, load_from_disk

from .example import Slice
from .teachers import TeacherArguments, slice_columns


DESCRIPTION = "teachers.json"


class SliceFeatures:
    """Features of every slice of every row of a dataset, memory-mapped.

    Attributes:
        description: The fingerprint of the teachers, and `own_width` and `cross_width` of the features.
        rows: Dataset of the column `slices`: for each row of the data, which of the features.
        features: Dataset of the columns `key` and `features`, one row for each distinct slice.
    """

    def __init__(self, description: dict, rows: Dataset, features: Dataset):
        self.description = description
        self.rows = rows
        self.features = features.with_format("torch")
        self.width = description["own_width"] + description["cross_width"]

    @classmethod
    def load(cls, folder: str | Path, args: TeacherArguments) -> "SliceFeatures":
        """
        Args:
            folder: What [`write_slice_features`] wrote.
            args: The teachers that are to be used.

        Raises:
            ValueError: there are no features, they are incomplete, or they are other teachers'.
        """
        description = read_description(Path(folder))
        if description is None:
            raise ValueError(
                f"{folder} holds no slice features; `hf-unigd embed-slices --output {folder}` makes them."
            )
        refuse_other_teachers(folder, description, args.fingerprint())
        parts = read_parts(Path(folder))
        written = sum(len(rows) for rows, _ in parts)
        if written < description["num_rows"]:
            raise ValueError(
                f"{folder} has features of {written} of {description['num_rows']} rows; run `hf-unigd embed-slices` "
                "again, which goes on where it stopped."
            )
        rows, features = (concatenate_datasets(list(column)) for column in zip(*parts, strict=True))
        return cls(description, rows, features)

    def modality_columns(self, triple_kernel: bool = True) -> dict[tuple[int, int], tuple[int, int]]:
        return slice_columns(self.description["own_width"], self.description["cross_width"], triple_kernel)

    def of_row(self, row: int, slices: list[Slice]) -> torch.Tensor:
        """Features `(len(slices), width)` of the slices of a row, float16.

        Raises:
            ValueError: the row was another one, or bad, when the features were made.
        """
        if row >= len(self.rows):
            raise ValueError(f"has no slice features: they end at row {len(self.rows) - 1}")
        places = self.rows[row]["slices"]
        entry = self.features[places] if places else {"key": torch.zeros(0), "features": torch.zeros(0, self.width)}
        if entry["key"].tolist() != [part.key for part in slices]:
            raise ValueError(
                "has changed since its slice features were made; make them anew with `hf-unigd embed-slices "
                "--overwrite`"
            )
        if entry["features"].shape[1] != self.width:
            raise ValueError(f"has slice features of width {entry['features'].shape[1]}, {self.width} is needed")
        return entry["features"]


def read_parts(folder: Path) -> list[tuple[Dataset, Dataset]]:
    """Rows and features of the finished parts, in order."""
    folders = sorted(part for part in folder.glob("part-*") if part.suffix != ".unfinished")
    return [(load_from_disk(part / "rows"), load_from_disk(part / "features")) for part in folders]


def read_description(folder: Path) -> dict | None:
    file = folder / DESCRIPTION
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def refuse_other_teachers(folder, description: dict, fingerprint: dict[str, str]) -> None:
    changed = [name for name, value in fingerprint.items() if description.get(name) != value]
    if changed:
        listing = "; ".join(f"{name} was {description.get(name)!r}, now {fingerprint[name]!r}" for name in changed)
        raise ValueError(
            f"The slice features in {folder} are stale: {listing}. Make them anew with `hf-unigd embed-slices "
            "--overwrite`, or use the teachers that they were made with."
        )
