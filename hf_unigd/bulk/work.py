"""Reads rows in parts beside the model, and shares the parts among processes."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Features, IterableDataset
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader, get_worker_info
from tqdm.auto import tqdm

from ..data import RowError
from ..data.features import without_decoding
from .processes import process_state


logger = logging.getLogger(__name__)

WINDOW = 8  # batches whose rows are sorted by length

Rows: TypeAlias = Dataset | IterableDataset
Row: TypeAlias = tuple[int, Mapping[str, Any]]  # its number and its columns
T = TypeVar("T")


class Batch(Protocol):
    """What a device works on at once."""

    @property
    def completed(self) -> int:
        """Number of rows that are done with it, for the progress bar."""


class Parts(Protocol):
    """Where the parts go, such as a [`~hf_unigd.bulk.parts.PartFolder`]."""

    def finished(self) -> Iterable[int]:
        """Numbers of the parts that are there."""

    def write(self, number: int, table: pa.Table, rows_read: int) -> None:
        """Writes a part, of `rows_read` rows, some of which may be left out of its table."""


@dataclass(frozen=True)
class OpenedRows:
    """
    Rows whose images are not decoded.

    Attributes:
        rows: The rows, map-style or a stream.
        features: Their features, with images that `datasets` decodes.
        identity: What they are recognised by when a run goes on: the fingerprint and the number of rows of a dataset,
            and the content of the first row of a stream.
    """

    rows: Rows
    features: Features
    identity: Mapping[str, Any]

    @classmethod
    def of(cls, rows: Rows, num_workers: int) -> "OpenedRows":
        """
        Raises:
            ValueError: there are no rows, or a stream has several workers, which would each read all of it.
        """
        if not isinstance(rows, IterableDataset):
            if len(rows) == 0:
                raise ValueError("The dataset has no rows.")
            return cls(without_decoding(rows), rows.features, {"rows": rows._fingerprint, "num_rows": len(rows)})
        if num_workers > 1:
            raise ValueError(
                f"`num_workers={num_workers}` for a stream, which one worker reads from its beginning to its end. Set "
                "it to 1, or load the rows without `dataset_streaming`."
            )
        rows = rows._resolve_features()
        undecoded = without_decoding(rows)
        first = next(iter(undecoded), None)
        if first is None:
            raise ValueError("The dataset has no rows.")
        return cls(undecoded, rows.features, {"rows": Hasher.hash(first), "num_rows": None})


@dataclass(frozen=True)
class _PartEnd:
    rows_read: int


class _CountedRows:
    """Rows, and how many of them have been read."""

    def __init__(self, rows: Iterable[Row]):
        self.rows = rows
        self.count = 0

    def __iter__(self) -> Iterator[Row]:
        for row in self.rows:
            self.count += 1
            yield row


@dataclass(eq=False)
class PartReader(torch.utils.data.IterableDataset):
    """
    Reads the parts of one process and prepares them, in the workers of a data loader if it has any.

    Args:
        rows: The rows, or examples of them. Of a stream, the parts of other processes and those that are finished are
            read past.
        rows_per_part: Number of rows of a part.
        prepare: Makes batches of the rows of a part.
        share: Number of this process.
        shares: Number of processes.
        finished: Numbers of the parts that are finished.
        wanted (`np.ndarray` of shape `(len(rows),)`): Which rows of a map-style dataset are read; None for all.
    """

    rows: Rows
    rows_per_part: int
    prepare: Callable[[Iterator[tuple[int, Any]]], Iterator[Batch]]
    share: int
    shares: int
    finished: frozenset[int]
    wanted: np.ndarray | None = None

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, rows in self._parts():
            counted = _CountedRows(rows)
            for batch in self.prepare(iter(counted)):
                yield number, batch
            yield number, _PartEnd(counted.count)

    def own_rows(self) -> int | None:
        """Number of the rows to read. None for a stream, which has no length."""
        return None if isinstance(self.rows, IterableDataset) else sum(map(len, self._ranges().values()))

    def _parts(self) -> Iterator[tuple[int, Iterable[Row]]]:
        if isinstance(self.rows, IterableDataset):
            for number, rows in groupby(enumerate(self.rows), key=lambda row: row[0] // self.rows_per_part):
                if self._is_own(number):
                    yield number, rows
            return
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, places in list(self._ranges().items())[first::step]:
            yield number, map(self._read, places)

    def _ranges(self) -> dict[int, Sequence[int]]:
        total = len(self.rows)
        starts = enumerate(range(0, total, self.rows_per_part))
        ranges = {n: range(start, min(start + self.rows_per_part, total)) for n, start in starts if self._is_own(n)}
        if self.wanted is None:
            return dict(ranges)
        chosen = {n: [row for row in rows if self.wanted[row]] for n, rows in ranges.items()}
        return {n: rows for n, rows in chosen.items() if rows}

    def _is_own(self, number: int) -> bool:
        return number % self.shares == self.share and number not in self.finished

    def _read(self, row: int) -> Row:
        try:
            return row, self.rows[row]
        except RowError:  # of rows that are parsed as they are read
            raise
        except Exception as error:  # of a transform
            raise RowError(row, f"cannot be read: {error or type(error).__name__}") from error


def work_through(
    rows: Rows,
    parts: Parts,
    rows_per_part: int,
    prepare: Callable[[Iterator[tuple[int, Any]]], Iterator[Batch]],
    run: Callable[[Any], T],
    make_table: Callable[[list[T]], pa.Table],
    *,
    num_workers: int = 0,
    wanted: np.ndarray | None = None,
    title: str,
    show_progress: bool = True,
) -> None:
    """
    Writes the parts that are missing, each by one process. All processes call it, and return when all parts are there.

    Args:
        rows: The rows, or a map-style dataset of their examples.
        parts: Where the parts are written.
        rows_per_part: Number of rows that are read for a part.
        prepare: Makes batches of the rows of a part, beside the device if there are workers.
        run: What the device does with a batch.
        make_table: Makes the table of a part of the results of its batches.
        num_workers: Number of processes beside this one that read and prepare rows.
        wanted: Which rows of a map-style dataset are read; None for all. Each process may know its own share alone.
        title: What the progress bar says.
        show_progress: Whether the first process draws a progress bar of its own share.
    """
    state = process_state()
    # The first process says what is finished: others go on meanwhile, or see the file system later.
    (finished,) = broadcast_object_list([frozenset(parts.finished()) if state.is_main_process else None])
    reader = PartReader(rows, rows_per_part, prepare, state.process_index, state.num_processes, finished, wanted)
    loader = DataLoader(reader, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is)
    results: dict[int, list[T]] = defaultdict(list)
    completed: dict[int, int] = defaultdict(int)
    with tqdm(
        total=reader.own_rows(),
        desc=title if state.num_processes == 1 else f"{title} (process 1 of {state.num_processes})",
        unit="row",
        disable=not (show_progress and state.is_main_process),
    ) as progress:
        for number, batch in loader:
            if isinstance(batch, _PartEnd):
                parts.write(number, make_table(results.pop(number, [])), batch.rows_read)
                progress.update(batch.rows_read - completed.pop(number, 0))
            else:
                results[number].append(run(batch))
                completed[number] += batch.completed
                progress.update(batch.completed)
    state.wait_for_everyone()


def _as_it_is(item: T) -> T:
    return item


def refuse(error: RowError, skip_bad_rows: bool) -> None:
    """
    Raises:
        RowError: `error`, unless bad rows are skipped.
    """
    if not skip_bad_rows:
        raise error
    logger.warning("Skipped: %s", error)


def windows(rows: Iterator[Row], batch_size: int) -> Iterator[list[Row]]:
    """The rows of `WINDOW` batches at a time."""
    while window := list(islice(rows, WINDOW * batch_size)):
        yield window
