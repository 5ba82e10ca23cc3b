"""The entries of an index that may be negatives of rows."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.images import open_image
from .duplicates import sequence_key
from .entries import ID, MODALITY
from .index import EmbeddingIndex
from .negative_columns import NegativeColumns, Parts
from .table import quoted


logger = logging.getLogger(__name__)

# Entries that are looked at beside the candidates that are wanted, because some are duplicates.
_SPARE = 8
_DEEPER = 4
# A row whose duplicates fill more than this many times its candidates gets fewer.
_DEEPEST = 64
_ENTRIES_READ_AT_ONCE = 256
_ENTRIES_REMEMBERED = 2**20


@dataclass(frozen=True)
class MinedRow:
    """
    A row whose negatives are searched for.

    Attributes:
        number: Its number.
        embedding (`np.ndarray` of shape `(d,)`): That of its anchor.
        entry_id: Id of the entry that is the row itself, if the index has it.
        row_format: Name of its format.
        modality: What its positive consists of, and so its negatives.
        known: Keys of what is no negative: the anchor, all that matches it, and the negatives that the row has.
        positive_score: Similarity of the anchor to its positive, the lowest if there are several.
    """

    number: int
    embedding: np.ndarray
    entry_id: str
    row_format: str
    modality: str
    known: frozenset[int]
    positive_score: float


class _Entry(NamedTuple):
    id: str
    key: int  # of what is embedded
    keys: frozenset[int]  # of that, and of what comes along
    formats: frozenset[str]  # of the rows that can hold it


class Candidates:
    """
    Finds the entries closest to rows that may be their negatives. What an entry holds is read once, and remembered as
    hashes.

    Args:
        index: The index.
        columns: How rows hold negatives, by the names of their formats.
        max_image_pixels: The largest width times height of an image.
    """

    def __init__(self, index: EmbeddingIndex, columns: Mapping[str, NegativeColumns], max_image_pixels: int):
        self.index = index
        self.columns = columns
        self.max_image_pixels = max_image_pixels
        self._counts = modality_counts(index)
        self._entries: dict[int, _Entry | None] = {}

    def find(self, rows: Sequence[MinedRow], count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """
        For each row, the row ids in the table, uint64, and the similarities, float32, of at most `count` entries, best
        first: those whose sequence is of the same modality as the positive, which the row can hold, which are not the
        row's own, and no duplicates of what is known to match or of one another.
        """
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for modality in {row.modality for row in rows}:
            places = [place for place, row in enumerate(rows) if row.modality == modality]
            of_modality = self._find([rows[place] for place in places], count, modality)
            found |= dict(zip(places, of_modality, strict=True))
        return [found[place] for place in range(len(rows))]

    def parts(self, row_ids: Iterable[int]) -> dict[int, Parts]:
        """The texts and encoded images of entries, by their row ids."""
        wanted = np.unique(np.fromiter(row_ids, np.uint64))
        if len(wanted) == 0:
            return {}
        taken = self.index.table.take(wanted, ["sequence"]).to_pylist()
        return {entry["_rowid"]: _parts(entry["sequence"]) for entry in taken}

    def _find(self, rows: Sequence[MinedRow], count: int, modality: str) -> list[tuple[np.ndarray, np.ndarray]]:
        total = self._counts[modality]
        where = None if total == len(self.index) else f"{MODALITY} = {quoted(modality)}"
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        pending, depth, deepest = list(range(len(rows))), count + _SPARE, min(total, _DEEPEST * count + _SPARE)
        while pending:
            depth = min(depth, deepest)
            queries = torch.from_numpy(np.stack([rows[place].embedding for place in pending]))
            ranked = self.index.rank(queries, depth, where)
            self._remember(np.unique(np.concatenate([row_ids for row_ids, _ in ranked])))
            for place, (row_ids, scores) in zip(pending, ranked, strict=True):
                usable = self._usable(rows[place], row_ids, count)
                found[place] = row_ids[usable], scores[usable]
            pending = [place for place in pending if len(found[place][0]) < count and depth < deepest]
            depth *= _DEEPER
        return [found[place] for place in range(len(rows))]

    def _usable(self, row: MinedRow, row_ids: np.ndarray, count: int) -> list[int]:
        """Places of the first `count` entries that may be negatives of the row."""
        places: list[int] = []
        chosen: set[int] = set()
        for place, row_id in enumerate(row_ids.tolist()):
            entry = self._entries[row_id]
            if entry is None or entry.id == row.entry_id or row.row_format not in entry.formats:
                continue
            if entry.keys & row.known or entry.key in chosen:
                continue
            chosen.add(entry.key)
            places.append(place)
            if len(places) == count:
                break
        return places

    def _remember(self, row_ids: np.ndarray) -> None:
        if len(self._entries) + len(row_ids) > _ENTRIES_REMEMBERED:
            self._entries.clear()
        unknown = np.array([each for each in row_ids.tolist() if each not in self._entries], np.uint64)
        for start in range(0, len(unknown), _ENTRIES_READ_AT_ONCE):
            wanted = unknown[start : start + _ENTRIES_READ_AT_ONCE]
            for entry in self.index.table.take(wanted, [ID, "sequence", "answer"]).to_pylist():
                self._entries[entry["_rowid"]] = self._read(entry)

    def _read(self, entry: Mapping[str, Any]) -> _Entry | None:
        parts, answer = _parts(entry["sequence"]), _parts(entry["answer"])
        try:
            opened, answers = [self._opened(part) for part in parts], [self._opened(part) for part in answer]
        except ValueError as error:
            logger.warning("Entry %s of the index %s. It is no negative.", entry[ID], error)
            return None
        key = sequence_key(opened)
        keys = {key, *(sequence_key([part]) for part in answers), *([sequence_key(answers)] if answers else [])}
        formats = frozenset(name for name, columns in self.columns.items() if columns.holds(parts))
        return _Entry(entry[ID], key, frozenset(keys), formats)

    def _opened(self, part: str | bytes) -> Any:
        """Bytes alone are decoded: an entry never makes a reader open a file or an address."""
        return part if isinstance(part, str) else open_image(bytes(part), max_pixels=self.max_image_pixels)


def modality_counts(index: EmbeddingIndex) -> dict[str, int]:
    """Number of the entries of each modality whose sequences the index holds whole."""
    counts = {each: index.table.count(f"{MODALITY} = {quoted(each)}") for each in ("text", "image", "mixed")}
    return {
        each: count for each, count in counts.items() if count and (each == "text" or index.description.store_images)
    }


def _parts(stored: Sequence[Mapping[str, Any]] | None) -> Parts:
    return [part["text"] if part["image"] is None else part["image"] for part in stored or []]
