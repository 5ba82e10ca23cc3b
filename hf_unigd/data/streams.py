"""Streams of examples, which know where they stand, so that a resumed run continues there."""

import copy
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import get_worker_info

from .example import Example, RowError
from .features import without_decoding
from .rows import RowParser


logger = logging.getLogger(__name__)

# Rows that are read at a time if they are not shuffled.
READ_TOGETHER = 100


class Skipped:
    """Takes the place of an example that was used before the run was resumed. Nothing is read for it."""


Position = dict[str, Any]  # of numbers, texts and lists alone, for JSON


class ExampleStream(torch.utils.data.IterableDataset):
    """
    A stream of examples. Each example has the `position` of the stream after it, from which a resumed run continues.

    Attributes:
        batch_size: Number of examples in a batch of the data loader.
        process_index: Index of the process whose share this is.
    """

    batch_size = 1
    process_index = 0

    def __init__(self) -> None:
        self._resumed: tuple[int, dict[int, Position]] | None = None

    def shard(self, count: int, index: int, batch_size: int = 1, endless: bool = False) -> "ExampleStream":
        """
        Returns the share of process `index` of `count` processes. Every row is in exactly one share, which the workers
        of a data loader divide further.

        Args:
            count, index: Number of processes, and which of them it is.
            batch_size: Number of examples in a batch of the data loader.
            endless: Start again in the order of the next epoch when the rows are exhausted.
        """
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the stream starts with."""
        raise NotImplementedError

    def check_workers(self, count: int) -> None:
        """
        Raises:
            ValueError: `count` workers of a data loader cannot read the stream as it should be read.
        """

    def iterate(self, position: Position | None, worker: int, workers: int) -> Iterator[Example]:
        """
        Yields the examples after `position`, or all of them.

        Args:
            position: The position of an earlier example.
            worker, workers: Index of the worker of a data loader, and number of them.
        """
        raise NotImplementedError

    def resume(self, batches: int, positions: dict[int, Position]) -> None:
        """
        Lets the stream continue where an interrupted run stopped. Data loaders skip the batches of that run, so the
        stream first yields [`Skipped`] in their places.

        Args:
            batches: Number of batches that were used.
            positions: For each worker, the position of its last example that was used.
        """
        self._resumed = batches, positions

    def __iter__(self) -> Iterator[Example | Skipped]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        position = None
        if self._resumed is not None:
            batches, positions = self._resumed
            # Batches come from the workers in turn.
            yield from repeat(Skipped(), self.batch_size * len(range(worker, batches, workers)))
            position = positions.get(worker)
        yield from self.iterate(position, worker, workers)


class IterableExampleDataset(ExampleStream):
    """The examples of a streaming dataset, whose rows are parsed as they come.

    Args:
        rows: Rows of any accepted format.
        parser: Turns a row into an [`Example`].
        skip_bad_rows: Skip bad rows instead of raising; every reason is logged, with the number skipped so far.
        shuffle_buffer_size: Number of rows that are read at a time and shuffled. The files of the dataset are shuffled
            too. Both orders depend on the seed and the epoch. With 0, rows come in their own order.
        seed: Seed of the order.

    Raises:
        RowError: on reading a bad row, if `skip_bad_rows` is off.
    """

    def __init__(
        self,
        rows: IterableDataset,
        parser: RowParser,
        skip_bad_rows: bool = False,
        shuffle_buffer_size: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        rows = without_decoding(rows)
        self.keeps_position = not _has_buffer(rows._ex_iterable)
        if shuffle_buffer_size:
            # A buffer of one row shuffles the files alone. Whatever waits in a larger one is lost on resuming.
            rows = rows.shuffle(seed, buffer_size=1, max_buffer_input_shards=1)
        self.rows = rows
        self.parser = parser
        self.skip_bad_rows = skip_bad_rows
        self.shuffle_buffer_size = shuffle_buffer_size
        self.seed = seed
        self.endless = False
        self.skipped = 0
        self.epoch = 0

    def shard(self, count, index, batch_size=1, endless=False):
        part = copy.copy(self)
        part.rows = split_dataset_by_node(self.rows, index, count) if count > 1 else self.rows
        part.endless, part.batch_size, part.process_index = endless, batch_size, index
        return part

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def iterate(self, position, worker, workers):
        rows = self.rows.with_format(None)  # a copy: `datasets` shares the epoch of one stream among all workers
        epoch = self.epoch if position is None else position["epoch"]
        while True:
            is_empty = position is None
            for example in self._one_pass(rows, epoch, position):
                is_empty = False
                yield example
            if is_empty or not self.endless:
                return
            epoch, position = epoch + 1, None

    def _one_pass(self, rows: IterableDataset, epoch: int, position: Position | None) -> Iterator[Example]:
        """A position is the state of the rows before a block of them, the number of its first row, and how many of the
        block were used."""
        position = position or {"rows": None, "first": 0, "used": 0}
        state, first, used = position["rows"], position["first"], position["used"]
        rows.set_epoch(epoch)
        with _without_warnings():
            rows.load_state_dict(state)
            iterator = iter(rows)
            block = list(islice(iterator, self.shuffle_buffer_size or READ_TOGETHER))
        while block:
            order = np.arange(len(block))
            if self.shuffle_buffer_size:
                np.random.default_rng((self.seed, epoch, first)).shuffle(order)
            for place in range(used, len(block)):
                example = self._read(block[order[place]], first + int(order[place]), epoch)
                if example is not None:
                    if self.keeps_position:
                        example.position = {"epoch": epoch, "rows": state, "first": first, "used": place + 1}
                    yield example
            state, first, used = rows.state_dict(), first + len(block), 0
            block = list(islice(iterator, self.shuffle_buffer_size or READ_TOGETHER))

    def _read(self, row: Any, index: int, epoch: int) -> Example | None:
        try:
            return self.parser(row, index, epoch)
        except RowError as error:
            if not self.skip_bad_rows:
                raise
            self.skipped += 1
            logger.warning("Skipped (%d so far): %s", self.skipped, error)
            return None


class MixedStream(ExampleStream):
    """
    Several streams as one. Endlessly, each example is drawn from one of them; otherwise they come one after the other.

    Args:
        streams: The streams.
        weights: How often each of them is drawn, relative to the others.
        seed: Seed of the draws.
        batches_together: If given, all examples of a batch, on all processes, are drawn from one stream, and so are
            those of this many batches in a row.
    """

    def __init__(
        self,
        streams: Sequence[IterableExampleDataset],
        weights: Sequence[float],
        seed: int = 0,
        batches_together: int | None = None,
    ):
        super().__init__()
        self.streams = list(streams)
        self.weights = list(weights)
        self.seed = seed
        self.batches_together = batches_together
        self.endless = False

    def shard(self, count, index, batch_size=1, endless=False):
        part = copy.copy(self)
        part.streams = [stream.shard(count, index, batch_size, endless) for stream in self.streams]
        part.endless, part.batch_size, part.process_index = endless, batch_size, index
        return part

    def set_epoch(self, epoch: int) -> None:
        for stream in self.streams:
            stream.set_epoch(epoch)

    def check_workers(self, count):
        for stream in self.streams:
            if self.batches_together and stream.rows.num_shards < count:
                raise ValueError(
                    f"`batch_by_source` needs each dataset on each worker, but {stream.parser.source} has "
                    f"{stream.rows.num_shards} files for {count} workers. Lower `dataloader_num_workers`, or write "
                    "the dataset in more files."
                )

    def iterate(self, position, worker, workers):
        drawn, positions = (0, [None] * len(self.streams)) if position is None else position.values()
        running = [
            stream.iterate(start, worker, workers) for stream, start in zip(self.streams, positions, strict=True)
        ]
        if not self.endless:
            for stream in running:
                yield from stream
            return
        weights = list(self.weights)
        while any(weights):
            source = self._draw(drawn, weights, worker, workers)
            example = next(running[source], None)
            if example is None:  # this worker has no file of the stream
                weights[source] = 0
                continue
            drawn += 1
            if example.position is not None:
                positions = [*positions[:source], example.position, *positions[source + 1 :]]
                example.position = {"drawn": drawn, "streams": positions}
            yield example

    def _draw(self, drawn: int, weights: list[float], worker: int, workers: int) -> int:
        if self.batches_together:
            # Batches come from the workers in turn, and all processes have the same number of them.
            batch = (worker + workers * (drawn // self.batch_size)) // self.batches_together
            state = f"{self.seed}-{batch}"
        else:
            state = f"{self.seed}-{self.process_index}-{worker}-{drawn}"
        return random.Random(state).choices(range(len(weights)), weights)[0]


def _has_buffer(rows: Any) -> bool:
    """Whether a stream of `datasets` was shuffled in a buffer, whose rows no position holds."""
    inner = [getattr(rows, "ex_iterable", None), *getattr(rows, "ex_iterables", [])]
    return type(rows).__name__ == "BufferShuffledExamplesIterable" or any(map(_has_buffer, filter(None, inner)))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps `datasets` from warning that its buffer, which holds no row, will be filled again."""
    theirs = logging.getLogger("datasets.iterable_dataset")
    was_disabled, theirs.disabled = theirs.disabled, True
    try:
        yield
    finally:
        theirs.disabled = was_disabled
