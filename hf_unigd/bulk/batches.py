"""Batches of the sequences of rows, which are made beside the model, and their embeddings."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from transformers import BatchFeature, PreTrainedModel

from ..data import RowError
from ..data.example import Messages
from ..data.lengths import length_batches, sequence_length
from ..modeling import SequenceError, UniGDProcessor
from .work import Row, refuse, windows


_Place = tuple[int, str]  # number of a row, and name of one of its sequences
# Returns the sequences of a row by their names, and what is kept of the row.
ReadRow: TypeAlias = Callable[[int, Mapping[str, Any]], tuple[dict[str, Messages], dict[str, Any]]]


@dataclass(frozen=True)
class Sequences:
    """A batch of sequences. `completed` is the number of rows whose first sequence is in it."""

    places: list[_Place]
    inputs: BatchFeature
    completed: int


@dataclass(frozen=True)
class RowsRead:
    """What is kept of rows whose sequences are all in the batches before. The others of a window were refused."""

    numbers: list[int]
    kept: list[dict[str, Any]]
    completed: int


@dataclass(frozen=True)
class Embedded:
    """The embeddings of a batch, float32."""

    places: list[_Place]
    embeddings: np.ndarray


@dataclass
class SequenceBatches:
    """
    Makes batches of sequences of about the same length.

    Attributes:
        processor: Processes the sequences.
        read: Reads a row.
        max_length: Maximum length of a sequence in tokens; None for no limit.
        batch_size: Number of sequences in a batch.
        skip_bad_rows: Leave bad rows out, each with its reason in the log, instead of raising.
    """

    processor: UniGDProcessor
    read: ReadRow
    max_length: int | None
    batch_size: int
    skip_bad_rows: bool

    def __call__(self, rows: Iterator[Row]) -> Iterator[Sequences | RowsRead]:
        """
        Raises:
            RowError: a row is bad and `skip_bad_rows` is off.
        """
        for window in windows(rows, self.batch_size):
            good: dict[int, dict[str, Any]] = {}
            sequences: dict[_Place, Messages] = {}
            first = set()
            for number, row in window:
                try:
                    read, kept = self.read(number, row)
                except RowError as error:
                    refuse(error, self.skip_bad_rows)
                else:
                    good[number] = kept
                    first.add((number, next(iter(read))))
                    sequences |= {(number, name): sequence for name, sequence in read.items()}
            parsed = len(good)
            places = list(sequences)
            lengths = [self._length(sequences[place]) for place in places]
            for batch in length_batches(lengths, self.batch_size):
                processed, inputs = self._process([places[place] for place in batch], sequences, good)
                if processed:
                    yield Sequences(processed, inputs, sum(place in first for place in processed))
            yield RowsRead(list(good), list(good.values()), completed=len(window) - parsed)

    def _length(self, sequence: Messages) -> int:
        try:
            return sequence_length(self.processor, sequence)
        except Exception:  # an image processor refuses an image in its own way; `_process` will name its row
            return 0

    def _process(self, places, sequences, good) -> tuple[list[_Place], BatchFeature]:
        """Returns the places of a batch that can be processed. Removes the others from `good`."""
        while places := [place for place in places if place[0] in good]:
            try:
                batch = self.processor.process_sequences(
                    [sequences[place] for place in places], max_length=self.max_length
                )
            except SequenceError as error:
                number = places[error.index][0]
                refuse(RowError(number, error.reason), self.skip_bad_rows)
                del good[number]
            else:
                return places, batch
        return [], BatchFeature()


@dataclass
class Embedder:
    """
    Embeds batches of sequences.

    Attributes:
        model: The model, in evaluation mode.
        truncate_dim: Matryoshka prefix to keep; None for all of an embedding.
    """

    model: PreTrainedModel
    truncate_dim: int | None

    @torch.no_grad()
    def __call__(self, batch: Sequences | RowsRead) -> Embedded | RowsRead:
        if isinstance(batch, RowsRead):
            return batch
        inputs = batch.inputs.to(self.model.device, self.model.dtype)
        embeddings = self.model.embed(**inputs, truncate_dim=self.truncate_dim)
        return Embedded(batch.places, embeddings.float().cpu().numpy())


def gather_results(
    results: Sequence[Embedded | RowsRead],
) -> tuple[list[dict[str, Any]], dict[str, list[np.ndarray]]]:
    """Returns what is kept of the rows that were not refused, and their embeddings by the names of the sequences."""
    found = {
        place: embedding
        for result in results
        if isinstance(result, Embedded)
        for place, embedding in zip(result.places, result.embeddings, strict=True)
    }
    by_number: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
    for (number, name), embedding in found.items():
        by_number[number][name] = embedding
    kept: list[dict[str, Any]] = []
    embeddings: dict[str, list[np.ndarray]] = defaultdict(list)
    for result in results:
        if isinstance(result, RowsRead):
            kept += result.kept
            for number in result.numbers:
                for name, embedding in by_number[number].items():
                    embeddings[name].append(embedding)
    return kept, embeddings


def as_fixed_size_lists(vectors: Sequence[np.ndarray] | np.ndarray, kind: pa.DataType) -> pa.Array:
    """An Arrow array of vectors of the same width, of the type `kind`."""
    values = np.array(vectors, np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(values), type=kind)
