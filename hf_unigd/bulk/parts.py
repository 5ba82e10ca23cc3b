"""The parts of an output: Parquet files of some rows each, in a folder that says what they are made with."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..inputs import reading
from ..outputs import remove_unfinished, writing


logger = logging.getLogger(__name__)

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
        with writing(self._file(number)) as unfinished:
            _write(unfinished, schema, [table])

    def read(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a finished part, and all of its columns by default."""
        return pq.ParquetFile(self._file(number)).read(columns and list(columns))

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

    def _file(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.parquet"


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


def begin_output(
    output: Path,
    data: PartFolder,
    unfinished: Sequence[PartFolder],
    description: Mapping[str, Any],
    overwrite: bool,
    kept: Sequence[PartFolder] = (),
) -> bool:
    """
    Begins a folder, or checks that what was begun before is the same.

    Args:
        output: The folder.
        data: Its folder of finished data, which is there once all is done.
        unfinished: Its folders of parts that are there until then, in the order in which they are written.
        description: What all of them depend on.
        overwrite: Throw away what they hold.
        kept: Its folders of parts that stay beside the data.

    Returns:
        Whether the output is finished.

    Raises:
        ValueError: the folder holds files of others, or was begun with another `description`.
    """
    folders = [data, *unfinished, *kept]
    begun = [folder for folder in folders if folder.description() is not None]
    written = {folder.folder for folder in (*begun, *unfinished, *kept)}
    others = [file.name for file in sorted(output.iterdir()) if file not in written] if output.is_dir() else []
    if others:
        raise ValueError(
            f"{output} holds files that no such command wrote: {', '.join(others[:5])}. Choose a new folder as "
            "`--output`."
        )
    if overwrite:
        for folder in begun:
            folder.remove()
    elif begun:
        check_same(begun[0].description() or {}, description, output)
    if data.description() is not None:
        logger.warning("%s is finished. `--overwrite true` starts anew.", output)
        return True
    if data.folder.exists():
        raise ValueError(f"{data.folder} holds files that no such command wrote. Choose a new folder as `--output`.")
    for folder in (*unfinished, *kept):
        folder.begin(description)
        if done := len(folder.finished()):
            logger.warning("Going on: of the parts of %d rows, %d are there.", description["rows_per_part"], done)
    return False
