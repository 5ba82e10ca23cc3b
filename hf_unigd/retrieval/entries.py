"""What an index keeps of a row: the sequence that is embedded, and what comes along with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Value
from PIL import Image as PILImage

from ..data import Example
from ..data.example import Messages, iter_parts
from ..data.formats import is_of_format
from ..data.images import open_image
from ..modeling.instructions_unigd import without_instruction


Part = str | PILImage.Image

ID, EMBEDDING, TEXT, MODALITY = "id", "embedding", "text", "modality"
COLUMNS = (ID, "row", "sequence", "answer", TEXT, MODALITY, EMBEDDING)


@dataclass(frozen=True)
class Hit:
    """
    An entry of an index that was found. Its images are decoded when they are asked for.

    Attributes:
        score: Cosine similarity to the query.
        id: What the entry is updated and deleted by.
        row: Number of its row in the source.
        sequence_parts: Texts, and encoded images, that are embedded.
        answer_parts: Texts, and encoded images, that come along without being embedded.
        metadata: The other columns of the row that the index keeps, by name.
    """

    score: float
    id: str
    row: int
    sequence_parts: Sequence[str | bytes] = field(repr=False)
    answer_parts: Sequence[str | bytes] = field(default=(), repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def sequence(self) -> list[Part]:
        """The texts and images that are embedded, in order; of a chat, the questions.

        Raises:
            ValueError: an image cannot be decoded.
        """
        return list(map(_decoded, self.sequence_parts))

    @cached_property
    def answer(self) -> list[Part]:
        """What comes along without being embedded: the row's answer, caption or match.

        Raises:
            ValueError: an image cannot be decoded.
        """
        return list(map(_decoded, self.answer_parts))

    @property
    def text(self) -> str:
        """All of its texts."""
        return " ".join(part for part in [*self.sequence_parts, *self.answer_parts] if isinstance(part, str))

    @property
    def image(self) -> PILImage.Image | None:
        """Its first image, or None."""
        encoded = (part for part in [*self.sequence_parts, *self.answer_parts] if not isinstance(part, str))
        first = next(encoded, None)
        return None if first is None else open_image(first)


def _decoded(part: str | bytes) -> Part:
    """Bytes alone are decoded: an entry never makes a reader open a file or an address."""
    return part if isinstance(part, str) else open_image(bytes(part))


def metadata_features(features: Features, names: Sequence[str] | None, id_column: str | None) -> Features:
    """
    The columns of single values that an index keeps beside its own. Classes are kept by their names.

    Args:
        features: Those of the rows.
        names: The columns to keep; None for all of single values that belong to no row format and hold no ids.
        id_column: The column that holds the ids.

    Raises:
        ValueError: a column is missing, is not of single values, or has the name of one of the index.
    """
    single = {name: kind for name, kind in features.items() if isinstance(kind, (Value, ClassLabel))}
    if names is None:
        names = [name for name in single if name != id_column and not is_of_format(name)]
    if id_column is not None and id_column not in single:
        raise ValueError(
            f"`id_column`: there is no column `{id_column}` of single values, only {', '.join(sorted(single))}."
        )
    for name in names:
        if name not in single:
            raise ValueError(
                f"`metadata_columns`: there is no column `{name}` of single values, only {', '.join(sorted(single))}."
            )
        if name in COLUMNS:
            remedy = "name it with `id_column`, " if name == ID else ""
            raise ValueError(
                f"The rows have a column `{name}`, and so has every index. Rename it, {remedy}or name the columns to "
                "keep with `metadata_columns`."
            )
    return Features({name: single[name] if isinstance(single[name], Value) else Value("string") for name in names})


def entry_schema(width: int, metadata: Features) -> pa.Schema:
    """The columns of an index of embeddings of this width."""
    parts = pa.list_(pa.struct([("text", pa.string()), ("image", pa.binary())]))
    return pa.schema(
        [
            pa.field(ID, pa.string(), nullable=False),
            ("row", pa.int64()),
            ("sequence", parts),
            ("answer", parts),
            (TEXT, pa.string()),
            (MODALITY, pa.string()),
            (EMBEDDING, pa.list_(pa.float32(), width)),
            *metadata.arrow_schema.remove_metadata(),
        ]
    )


def is_export(file: Path) -> bool:
    """Whether a Parquet file holds entries of an index."""
    return set(COLUMNS) <= set(pq.read_schema(file).names)


def make_entry(example: Example, store_images: bool) -> dict[str, Any]:
    """
    An example as an index keeps it, without its id, its embedding, and its metadata.

    Args:
        example: Its images are encoded.
        store_images: Whether images are kept.
    """
    answer = _parts(example.positive or [], store_images)
    if example.target is not None:
        answer.append({"text": example.target, "image": None})
    sequence = _parts(example.anchor, store_images)
    texts = [part["text"] for part in sequence + answer if part["text"] is not None]
    entry = {"row": example.row, "sequence": sequence, "answer": answer, TEXT: " ".join(texts)}
    return {**entry, MODALITY: modality_of(example.anchor)}


def modality_of(messages: Messages) -> str:
    """What a sequence consists of, an instruction apart: `"text"`, `"image"`, or `"mixed"` if it is of both."""
    kinds = {part["type"] for _, part in iter_parts(without_instruction(messages))}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def make_hit(entry: Mapping[str, Any], score: float) -> Hit:
    """
    Args:
        entry: A row of the table.
        score: Its similarity to the query.
    """
    sequence, answer = (
        [part["text"] if part["image"] is None else part["image"] for part in entry[name] or []]
        for name in ("sequence", "answer")
    )
    metadata = {name: value for name, value in entry.items() if name not in COLUMNS and not name.startswith("_")}
    return Hit(score, entry[ID], entry["row"], sequence, answer, metadata)


def _parts(messages: Messages, store_images: bool) -> list[dict[str, Any]]:
    parts = []
    for _, part in iter_parts(without_instruction(messages)):
        if part["type"] == "text":
            parts.append({"text": part["text"], "image": None})
        elif store_images:
            parts.append({"text": None, "image": part["image"]})
    return parts
