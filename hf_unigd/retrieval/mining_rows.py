"""The first pass of mining: the rows' anchors are embedded, and what is known to match them is noted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..bulk.batches import Embedded, RowsRead, as_fixed_size_lists
from ..bulk.parts import PartFolder
from ..data import Example, RowError, RowParser
from ..data.example import Messages, content_key, iter_parts
from ..data.formats import format_of
from ..modeling.instructions_unigd import is_instruction, with_instruction
from .building import RowIds
from .duplicates import messages_key
from .entries import modality_of
from .negative_columns import NegativeColumns


_ANCHOR, _POSITIVE = "anchor", "positive"
_CAPTIONS = ("short_caption", "caption")
_NAMES = {"text": "a text", "image": "an image", "mixed": "texts and images together"}


@dataclass
class AnchorReader:
    """
    Reads what is embedded of a row, its anchor and its positives, and what the search has to know of it.

    Attributes:
        parser: Parses rows as training does.
        ids: The ids of the rows' own entries.
        columns: How rows hold negatives, by their formats.
        modalities: Those of the entries of the index.
    """

    parser: RowParser
    ids: RowIds
    columns: Mapping[str, NegativeColumns]
    modalities: frozenset[str]

    def __call__(self, number: int, row: Mapping[str, Any]) -> tuple[dict[str, Messages], dict[str, Any]]:
        example = self.parser(row, number)
        if example.positive is None:
            raise RowError(number, "has no match, so there are no negatives to find. Leave such rows out.")
        given = {name: value for name, value in row.items() if value is not None}
        row_format = format_of(given)
        positives = _positives(example, row_format.under_own_names(given))
        modality = modality_of(example.positive)
        if modality not in self.modalities:
            held = " and ".join(_NAMES[each] for each in sorted(self.modalities)) or "nothing"
            raise RowError(
                number,
                f"has {_NAMES[modality]} as its match, and so are its negatives, but the index has no such entry: its "
                f"entries are {held}. Index what the rows are to find.",
            )
        known = [example.anchor, *positives, *example.captions, *example.negatives]
        sequences = {_ANCHOR: example.anchor, **{f"{_POSITIVE} {n}": each for n, each in enumerate(positives)}}
        return sequences, {
            "row": number,
            "id": self.ids.of(number, row),
            "format": row_format.name,
            "modality": modality,
            "anchor_key": content_key(example.anchor),
            "known": sorted({messages_key(each) for each in known}),
        }


def _positives(example: Example, named: Mapping[str, Any]) -> list[Messages]:
    """The positive, or of a list of captions all that training may draw."""
    assert example.positive is not None
    listed = (named[name] for name in _CAPTIONS if isinstance(named.get(name), (list, tuple)))
    texts = next(listed, None)
    if texts is None or not all(isinstance(text, str) for text in texts):  # a conversation has one answer
        return [example.positive]
    instruction = next((part["text"] for _, part in iter_parts(example.positive) if is_instruction(part)), None)
    wanted = {text.strip() for text in texts}
    drawn = {text: each for each in example.captions if (text := each[0]["content"][0]["text"]) in wanted}
    return [with_instruction(each, instruction) for each in drawn.values()]


def anchor_table(results: Sequence[Embedded | RowsRead], width: int) -> pa.Table:
    """A table of what [`AnchorReader`] keeps, the anchors' embeddings, and the lowest similarity of a positive."""
    found = {
        place: embedding
        for result in results
        if isinstance(result, Embedded)
        for place, embedding in zip(result.places, result.embeddings, strict=True)
    }
    scores: dict[int, float] = {}
    for (number, name), embedding in found.items():
        if name != _ANCHOR and (number, _ANCHOR) in found:
            scores[number] = min(scores.get(number, np.inf), float(found[number, _ANCHOR] @ embedding))
    kept = [row for result in results if isinstance(result, RowsRead) for row in result.kept]
    vectors = as_fixed_size_lists([found[row["row"], _ANCHOR] for row in kept], pa.list_(pa.float32(), width))
    rows = pa.Table.from_pylist(
        [{**row, "positive_score": scores[row["row"]]} for row in kept],
        pa.schema(
            [
                ("row", pa.int64()),
                ("id", pa.string()),
                ("format", pa.string()),
                ("modality", pa.string()),
                ("anchor_key", pa.int64()),
                ("known", pa.list_(pa.int64())),
                ("positive_score", pa.float32()),
            ]
        ),
    )
    return rows.append_column("embedding", vectors)


@dataclass(frozen=True)
class Matches:
    """What is known to match an anchor, in all rows that have it, and the lowest similarity of a positive."""

    known: frozenset[int]
    positive_score: float


def shared_anchors(parts: PartFolder) -> dict[int, Matches]:
    """The matches of the anchors that several rows have, by the anchors' keys."""
    columns = ["anchor_key", "known", "positive_score"]
    keys = np.concatenate([parts.read(number, columns[:1])["anchor_key"].to_numpy() for number in parts.finished()])
    values, counts = np.unique(keys, return_counts=True)
    shared = frozenset(values[counts > 1].tolist())
    found: dict[int, Matches] = {}
    for number in parts.finished() if shared else ():
        for row in parts.read(number, columns).to_pylist():
            if (key := row["anchor_key"]) in shared:
                before = found.get(key, Matches(frozenset(), np.inf))
                score = min(before.positive_score, row["positive_score"])
                found[key] = Matches(before.known.union(row["known"]), score)
    return found
