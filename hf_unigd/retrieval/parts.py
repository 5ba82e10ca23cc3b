"""The files of an index: each holds the entries of some rows, and is written whole or not at all."""

import re
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from ..inputs import reading


_NAME = re.compile(r"rows-\d{10}-\d{10}\.arrow")


def part_file(folder: Path, start: int, stop: int) -> Path:
    """The file of the rows `start` to `stop` (exclusive)."""
    return folder / f"rows-{start:010d}-{stop:010d}.arrow"


def finished_parts(folder: Path) -> list[Path]:
    """The finished files, in the order of their rows."""
    return [file for file in sorted(folder.iterdir()) if _NAME.fullmatch(file.name)]


def rows_done(folder: Path) -> int:
    """How many rows have been read, bad ones that were skipped included."""
    return max((int(file.stem.rsplit("-", 1)[1]) for file in finished_parts(folder)), default=0)


def read_entries(folder: Path) -> Dataset:
    """All entries, memory-mapped."""
    with reading(folder):
        return concatenate_datasets([Dataset.from_file(str(file)) for file in finished_parts(folder)])
