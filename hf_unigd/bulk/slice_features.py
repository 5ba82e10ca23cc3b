"""Runs the teachers over a dataset once and writes their features in the format that [`SliceFeatures`] reads."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import broadcast_object_list
from datasets import Features, List, Value

from ..data import Example, ExampleDataset, MixedDataset, SliceFeatures, TeacherArguments, Teachers
from ..data.example import Slice
from ..data.slice_features import DESCRIPTION, FEATURES, PARTS, ROWS, read_description
from ..data.teachers import TeacherInputs, TeacherPreprocessor
from ..outputs import remove_unfinished, writing
from ..settings import check_positive
from .keys import KeyPlaces, KeySet
from .parts import PartFolder, check_same
from .processes import process_state
from .work import work_through


logger = logging.getLogger(__name__)


def write_slice_features(
    examples: ExampleDataset | MixedDataset,
    args: TeacherArguments,
    folder: str | Path,
    device: torch.device | str = "cpu",
    *,
    batch_size: int = 64,
    rows_per_part: int = 1000,
    num_workers: int = 0,
    overwrite: bool = False,
    show_progress: bool = True,
) -> SliceFeatures:
    """
    Runs the teachers over a dataset and writes the features of its slices. If a launcher started several processes,
    each embeds its share, and all of them call this. A run that was interrupted goes on with the parts that are
    missing; finished features are left as they are.

    The features of each distinct image or sentence are written once. What is encoded twice is what several processes
    or workers come upon in one run.

    Args:
        examples: The dataset, whose parser has a splitter, so that every example has its slices. If it skips bad rows,
            they get no features.
        args: The teachers.
        folder: Folder to write, or to go on in. Until the features are finished, their parts are in a hidden folder
            in it; for a moment, the disk holds both.
        device: Device that the teachers of this process run on.
        batch_size: Maximum number of slices that are passed to the teachers at once.
        rows_per_part: Rows of a part, which an interruption can cost each process and each of its workers.
        num_workers: Number of processes that open and process images beside each process.
        overwrite: Delete the features that the folder has, instead of going on.
        show_progress: Whether to draw a progress bar.

    Returns:
        The features that were written.

    Raises:
        ValueError: all rows are bad, or the folder has features of other teachers, of a dataset with another number of
            rows, or begun with another `rows_per_part`, or holds other files.
        RowError: a row is bad and `examples` does not skip bad rows. The parts that are finished are kept.
    """
    folder = Path(folder)
    check_positive(batch_size=batch_size, rows_per_part=rows_per_part)
    parts = PartFolder(folder / PARTS)
    teachers = Teachers(args, device)
    description = {
        **args.fingerprint(),
        "own_width": teachers.own_width,
        "cross_width": teachers.cross_width,
        "num_rows": len(examples),
        "rows_per_part": rows_per_part,
    }
    is_finished, state = None, process_state()
    if state.is_main_process:
        is_finished = _begin(folder, parts, description, overwrite)
    if not broadcast_object_list([is_finished])[0]:
        width = teachers.own_width + teachers.cross_width
        work_through(
            examples,
            parts,
            rows_per_part,
            _SliceBatches(teachers.preprocess, batch_size, KeySet(_keys_of(parts))),
            _Encoding(teachers),
            lambda results: _make_table(results, width),
            num_workers=num_workers,
            title="Embedding slices",
            show_progress=show_progress,
        )
        if teachers.truncated:
            logger.warning("%d texts were longer than the limit of an encoder and were truncated.", teachers.truncated)
        if state.is_main_process:
            _finish(folder, parts, description)
        state.wait_for_everyone()
    return SliceFeatures.load(folder, args)


def _begin(folder: Path, parts: PartFolder, description: dict[str, Any], overwrite: bool) -> bool:
    """Begins, or checks that what was begun before is the same. Returns whether it is finished."""
    remove_unfinished(folder, ROWS, FEATURES, DESCRIPTION)
    finished = read_description(folder)
    made = finished or parts.description()
    if made is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files, and no slice features. Choose a new folder as `--output`.")
    if overwrite and made is not None:
        # The description last: without it, the files that are left would be files of others.
        for name in (ROWS, FEATURES, DESCRIPTION):
            (folder / name).unlink(missing_ok=True)
        parts.remove()
    elif made is not None:
        check_same(made, description, folder)
        if finished is not None:
            logger.warning("%s is finished. `--overwrite true` embeds the slices again.", folder)
            parts.remove()  # which may have been interrupted
            return True
    parts.begin(description)
    if done := len(parts.finished()):
        logger.warning("Going on: of the parts of %d rows, %d are there.", description["rows_per_part"], done)
    return False


@dataclass(frozen=True)
class _Slices:
    """
    Slices to encode.

    Attributes:
        rows: The rows whose slices are all in this batch or in those before: the keys of the slices of each, and how
            many of them are encoded.
        keys: The keys of the slices.
        inputs: What the teachers make of the slices; None if there are none.
    """

    rows: list[tuple[list[int], int]]
    keys: list[int]
    inputs: TeacherInputs | None

    @property
    def completed(self) -> int:
        return len(self.rows)


@dataclass
class _SliceBatches:
    """
    Makes batches of the slices that are not among `known`, and adds them to it.
    """

    preprocess: TeacherPreprocessor
    batch_size: int
    known: KeySet

    def __call__(self, rows: Iterator[tuple[int, Example | None]]) -> Iterator[_Slices]:
        done: list[tuple[list[int], int]] = []
        waiting: dict[int, Slice] = {}  # at most one batch, because images are decoded
        for _, example in rows:
            slices = [] if example is None else example.slices
            keys = [one.key for one in slices]
            is_new = self.known.add(np.array(keys, np.int64))
            for place in np.flatnonzero(is_new):
                waiting[keys[place]] = slices[place]
                if len(waiting) == self.batch_size:
                    yield self._batch(done, waiting)
                    done, waiting = [], {}
            done.append((keys, int(is_new.sum())))
        yield self._batch(done, waiting)

    def _batch(self, done: list[tuple[list[int], int]], waiting: dict[int, Slice]) -> _Slices:
        return _Slices(done, list(waiting), self.preprocess(list(waiting.values())) if waiting else None)


class _Encoded(NamedTuple):
    """The rows and keys of a batch, and the features of its slices, float16 of shape `(len(keys), width)`."""

    rows: list[tuple[list[int], int]]
    keys: list[int]
    features: np.ndarray | None


@dataclass
class _Encoding:
    teachers: Teachers

    def __call__(self, batch: _Slices) -> _Encoded:
        features = None if batch.inputs is None else self.teachers.encode(batch.inputs).half().cpu().numpy()
        return _Encoded(batch.rows, batch.keys, features)


def _make_table(results: Sequence[_Encoded], width: int) -> pa.Table:
    """
    A row for each row of the data: the keys of its slices, and of those that no earlier row has, the keys and the
    features. Parquet stores bytes ten times faster than lists of numbers.
    """
    rows = [row for result in results for row in result.rows]
    found = [result.features for result in results if result.features is not None]
    features = np.concatenate([np.zeros((0, width), np.float16), *found])
    keys = np.array([key for result in results for key in result.keys], np.int64)
    vectors = pa.Array.from_buffers(pa.binary(2 * width), len(features), [None, pa.py_buffer(features)])
    encoded = _offsets([count for _, count in rows])
    return pa.table(
        {
            "slices": pa.ListArray.from_arrays(
                _offsets([len(slices) for slices, _ in rows]),
                pa.array(np.array([key for slices, _ in rows for key in slices], np.int64)),
            ),
            "keys": pa.ListArray.from_arrays(encoded, pa.array(keys)),
            "features": pa.ListArray.from_arrays(encoded, vectors),
        }
    )


def _offsets(lengths: Sequence[int] | np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _keys_of(parts: PartFolder) -> np.ndarray:
    """The keys whose features the finished parts hold, in order."""
    keys = [_flat(pq.read_table(file, columns=["keys"])["keys"]).to_numpy() for file in parts.finished().values()]
    return np.concatenate([np.zeros(0, np.int64), *keys])


def _finish(folder: Path, parts: PartFolder, description: dict[str, Any]) -> None:
    """Makes one file of the rows, one of the features, and removes the parts."""
    width = description["own_width"] + description["cross_width"]
    places = KeyPlaces(_keys_of(parts))
    if not len(places):
        parts.remove()
        raise ValueError("None of the rows can be used; the log has each one's reason.")
    rows = Features({"slices": List(Value("int64"))}).arrow_schema
    features = Features({"key": Value("int64"), "features": List(Value("float16"), length=width)}).arrow_schema
    skipped = start = 0
    with _arrow_file(folder / ROWS, rows) as rows_file, _arrow_file(folder / FEATURES, features) as features_file:
        for file in parts.finished().values():
            part = pq.read_table(file)
            slices = places.find(_flat(part["slices"]).to_numpy())
            lengths = part["slices"].combine_chunks().value_lengths().to_numpy()
            lists = pa.ListArray.from_arrays(_offsets(lengths), pa.array(slices))
            rows_file.write_batch(pa.record_batch([lists], schema=rows))
            skipped += int((lengths == 0).sum())

            keys = _flat(part["keys"]).to_numpy()
            is_first = places.is_first[start : start + len(keys)]
            start += len(keys)
            values = _vectors(_flat(part["features"]), width)[is_first].reshape(-1)
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), type=features.field("features").type)
            features_file.write_batch(pa.record_batch([pa.array(keys[is_first]), vectors], schema=features))
    if skipped:
        logger.warning("Skipped %d of %d rows.", skipped, description["num_rows"])
    with writing(folder / DESCRIPTION) as unfinished:
        unfinished.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    parts.remove()


@contextmanager
def _arrow_file(file: Path, schema: pa.Schema) -> Iterator[pa.RecordBatchStreamWriter]:
    """Writes a file as `datasets` maps it into memory."""
    with writing(file) as unfinished, pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
        yield out


def _flat(lists: pa.ChunkedArray) -> pa.Array:
    """The values of a column of lists, one after the other."""
    return lists.combine_chunks().flatten()


def _vectors(binary: pa.FixedSizeBinaryArray, width: int) -> np.ndarray:
    """The vectors whose bytes an array holds, of shape `(len(binary), width)`, float16. Nothing is copied."""
    values = np.frombuffer(binary.buffers()[1], np.float16).reshape(-1, width)
    return values[binary.offset : binary.offset + len(binary)]
