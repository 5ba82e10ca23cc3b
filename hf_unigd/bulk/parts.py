"""The parts of an output: Parquet files of some rows each, in a folder that says what they are made with."""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..inputs import reading
from ..outputs import remove_unfinished, writing


# Hidden, so that `datasets` does not take it for data.
DESCRIPTION = ".description.json"
_METADATA, _ROWS = b"hf_unigd", b"hf_unigd.rows"
_NAME = re.compile(r"part-(\d{6,})\.parquet")
_BYTES_PER_GROUP = 64 * 1024**2  # of a row group, which readers load as a whole


class PartFolder:
    """
    A folder of parts. Each is whole or absent, and covers a fixed range of the rows that are read.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def begin(self, description: Mapping[str, Any]) -> None:
        """
        Makes the folder if it is missing, and removes what a killed process left in it.

        Args:
            description: What the parts depend on, as values that JSON can hold. Its keys are names of arguments.

        Raises:
            ValueError: the folder holds files of others.
        """
        remove_unfinished(self.folder, "part-*.parquet", DESCRIPTION)
        if self.description() is not None:
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds other files, and no parts of a run. Choose another `--output`.")
        self.folder.mkdir(parents=True, exist_ok=True)
        with writing(self.folder / DESCRIPTION) as file:
            file.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def description(self) -> dict[str, Any] | None:
        """
        What the parts are made with; None where there are none.

        Raises:
            ValueError: the file that says it is damaged.
        """
        file = self.folder / DESCRIPTION
        if not file.is_file():
            return None
        with reading(file):
            return dict(json.loads(file.read_text(encoding="utf-8")))

    def remove(self) -> None:
        """Removes the parts, and the folder if it holds nothing else."""
        if self.description() is None:
            return
        # The description last: without it, the parts that are left would be files of others.
        for file in [*self.finished().values(), self.folder / DESCRIPTION]:
            file.unlink()
        with suppress(OSError):  # it holds something else
            self.folder.rmdir()

    def finished(self) -> dict[int, Path]:
        """The finished parts by their numbers, in order."""
        found = {int(match[1]): file for file in self.folder.iterdir() if (match := _NAME.fullmatch(file.name))}
        return dict(sorted(found.items()))

    def write(self, number: int, table: pa.Table, rows_read: int) -> None:
        """
        Writes a part.

        Args:
            number: Its number.
            table: Its rows.
            rows_read: Number of the rows that it covers, those that were left out included.
        """
        schema = table.schema.with_metadata({**(table.schema.metadata or {}), _ROWS: str(rows_read)})
        with writing(self.folder / f"part-{number:06d}.parquet") as unfinished:
            _write(unfinished, schema, [table])

    def counts(self) -> tuple[int, int]:
        """The number of rows that the finished parts hold, and the number of rows that were read for them."""
        files = [pq.read_metadata(file) for file in self.finished().values()]
        return sum(file.num_rows for file in files), sum(int(file.metadata[_ROWS]) for file in files)

    def merge(self, file: Path) -> None:
        """Writes all rows to one Parquet file, which keeps the description, and removes the parts."""
        parts = list(self.finished().values())
        schema = pq.read_schema(parts[0])
        metadata = {name: value for name, value in schema.metadata.items() if name != _ROWS}
        schema = schema.with_metadata({**metadata, _METADATA: json.dumps(self.description())})
        with writing(file) as unfinished:
            _write(unfinished, schema, (pq.ParquetFile(part).read() for part in parts))
        self.remove()


def _write(file: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Writes a Parquet file, of which one table at a time is in memory."""
    with pq.ParquetWriter(file, schema) as writer:
        for table in filter(len, tables):  # `datasets` cannot read a group without rows
            rows = table.num_rows * _BYTES_PER_GROUP // max(table.nbytes, 1)
            writer.write_table(table, row_group_size=max(rows, 1))


def description_of(file: Path) -> dict[str, Any] | None:
    """What a merged file is made with; None for any other file."""
    try:
        return dict(json.loads((pq.read_schema(file).metadata or {})[_METADATA]))
    except (KeyError, TypeError, OSError, ValueError):  # pyarrow's errors are ValueErrors
        return None


def check_same(made: Mapping[str, Any], now: Mapping[str, Any], output: Path) -> None:
    """
    Args:
        made: What an output is made with.
        now: What it would be made with now. The key `probe`, which is only equal up to rounding, is left out.
        output: The output.

    Raises:
        ValueError: they differ. The message names every difference.
    """
    changed = [
        f"`{name}` was {made.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(made.keys() | now.keys())
        if name != "probe" and made.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{output} was begun with another model, other rows or settings: {'; '.join(changed)} (`rows` is the "
            "fingerprint of the dataset). Choose another `--output`, or start anew with `--overwrite true`."
        )
