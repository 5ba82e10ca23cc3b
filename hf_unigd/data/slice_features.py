"""Teacher features of a dataset's slices, computed once and read from disk in training.

A folder of features holds `teachers.json`, which names everything that the features depend on, and two Arrow files.
`features.arrow` has one row, in half precision, for each distinct image or sentence. `rows.arrow` has one row for each
row of the data: the places of its slices in the features. While they are made, the folder holds parts of them, and no
`teachers.json`.
"""

import json
from pathlib import Path

import torch
from datasets import Dataset

from ..inputs import reading
from .example import Slice
from .teachers import TeacherArguments, slice_columns


DESCRIPTION, ROWS, FEATURES = "teachers.json", "rows.arrow", "features.arrow"
PARTS = ".parts"  # of features that are not finished


class SliceFeatures:
    """Teacher features of every slice of every row of a dataset, memory-mapped.

    Attributes:
        description: The fingerprint of the teachers, the widths `own_width` and `cross_width`, `num_rows`, and
            `rows_per_part`, in which they were computed.
        rows: Dataset with the column `slices`. It lists for each row of the data the places of its slices in
            `features`.
        features: Dataset with the columns `key` and `features`, one row for each distinct slice.
        width: `own_width + cross_width`.
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
            folder: Folder that [`~hf_unigd.bulk.write_slice_features`] wrote.
            args: The teachers of the training run.

        Raises:
            ValueError: the folder has no features, or unfinished or damaged ones, or other teachers computed them.
        """
        folder = Path(folder)
        description = read_description(folder)
        if description is None and (folder / PARTS).is_dir():
            raise ValueError(
                f"The slice features in {folder} are not finished; run `hf-unigd embed-slices` again, which goes on "
                "where it stopped."
            )
        if description is None:
            raise ValueError(
                f"{folder} holds no slice features; `hf-unigd embed-slices --output {folder}` computes them."
            )
        check_fingerprint(folder, description, args.fingerprint())
        with reading(folder):
            rows, features = (Dataset.from_file(str(folder / name)) for name in (ROWS, FEATURES))
        return cls(description, rows, features)

    def part(self, first: int, count: int) -> "SliceFeatures":
        """Returns the features of `count` rows, of which the first is row `first` of these."""
        if first + count > len(self.rows):
            raise ValueError(
                f"There are slice features of {len(self.rows)} rows, but the datasets have more. Compute them with "
                "`hf-unigd embed-slices` for the same `datasets`, in the same order."
            )
        return SliceFeatures(self.description, self.rows.select(range(first, first + count)), self.features)

    def modality_columns(self, triple_kernel: bool = True) -> dict[tuple[int, int], tuple[int, int]]:
        """Returns the columns in which slices are compared, as [`slice_columns`] does."""
        return slice_columns(self.description["own_width"], self.description["cross_width"], triple_kernel)

    def read_row(self, row: int, slices: list[Slice]) -> torch.Tensor:
        """Reads the features of the slices of a row.

        Args:
            row: Index of the row in the dataset that the features were computed for.
            slices: The slices of that row.

        Returns:
            Tensor of shape `(len(slices), width)`, float16.

        Raises:
            ValueError: there are no features of the row, the row had other slices when they were computed, or they
                have another width than `teachers.json` says. The message continues "Row 3 ...".
        """
        if row >= len(self.rows):
            raise ValueError(f"has no slice features: they end at row {len(self.rows) - 1}")
        places = self.rows[row]["slices"]
        entry = self.features[places] if places else {"key": torch.zeros(0), "features": torch.zeros(0, self.width)}
        if entry["key"].tolist() != [part.key for part in slices]:
            raise ValueError(
                "has changed since its slice features were computed, or holds a list of captions, of which each epoch "
                "draws one. Compute them again with `hf-unigd embed-slices --overwrite true`; with a list, train "
                "without `slice_features`"
            )
        if entry["features"].shape[1] != self.width:
            raise ValueError(
                f"has slice features of width {entry['features'].shape[1]}, but `{DESCRIPTION}` says {self.width}; "
                "compute them again with `hf-unigd embed-slices --overwrite true`"
            )
        return entry["features"]


def read_description(folder: Path) -> dict | None:
    """Returns what `teachers.json` says, or None if there is no such file."""
    file = folder / DESCRIPTION
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def check_fingerprint(folder: str | Path, description: dict, fingerprint: dict[str, str]) -> None:
    """Checks that the features of a folder were computed by the teachers of `fingerprint`.

    Raises:
        ValueError: they were not. The message names every difference.
    """
    changed = [name for name, value in fingerprint.items() if description.get(name) != value]
    if changed:
        listing = "; ".join(f"{name} was {description.get(name)!r}, now {fingerprint[name]!r}" for name in changed)
        raise ValueError(
            f"The slice features in {folder} are stale: {listing}. Compute them again with `hf-unigd embed-slices "
            "--overwrite true`, or use the teachers that computed them."
        )
