"""What an index keeps of a row: the sequence that is embedded, and what comes along with it."""

from dataclasses import dataclass
from io import BytesIO
from typing import Any

from datasets import Features, Image, List, Value
from PIL import Image as PILImage

from ..data import Example
from ..data.example import Messages, iter_parts
from ..modeling.instructions_unigd import without_instruction


Part = str | PILImage.Image


@dataclass(frozen=True)
class Hit:
    """
    An entry of an index that was found.

    Attributes:
        score: Cosine similarity to the query.
        row: Number of its row in the source.
        sequence: The texts and pictures that are embedded, in order; of a chat, the questions.
        answer: What comes along without being embedded: the row's answer, caption or match.
    """

    score: float
    row: int
    sequence: list[Part]
    answer: list[Part]

    @property
    def text(self) -> str:
        """All of its texts."""
        return " ".join(part for part in self.sequence + self.answer if isinstance(part, str))

    @property
    def image(self) -> PILImage.Image | None:
        """The first of its pictures."""
        return next((part for part in self.sequence + self.answer if not isinstance(part, str)), None)


def entry_features(width: int) -> Features:
    """Columns of an index of embeddings of this width."""
    parts = List({"text": Value("string"), "image": Image()})
    return Features(
        {
            "row": Value("int64"),
            "sequence": parts,
            "answer": parts,
            "embedding": List(Value("float32"), length=width),
        }
    )


def make_entry(example: Example, store_images: bool) -> dict[str, Any]:
    """An example as an index keeps it, without its embedding."""
    answer = _parts(example.positive or [], store_images)
    if example.target is not None:
        answer.append({"text": example.target, "image": None})
    return {"row": example.row, "sequence": _parts(example.anchor, store_images), "answer": answer}


def make_hit(entry: dict[str, Any], score: float) -> Hit:
    sequence, answer = (
        [part["image"] if part["text"] is None else part["text"] for part in entry[name]]
        for name in ("sequence", "answer")
    )
    return Hit(score, entry["row"], sequence, answer)


def _parts(messages: Messages, store_images: bool) -> list[dict[str, Any]]:
    parts = []
    for _, part in iter_parts(without_instruction(messages)):
        if part["type"] == "text":
            parts.append({"text": part["text"], "image": None})
        elif store_images:
            parts.append({"text": None, "image": {"bytes": _encode(part["image"]), "path": None}})
    return parts


def _encode(image: PILImage.Image) -> bytes:
    """PNG, quickly: at Pillow's own level it would take longer than the embedding."""
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
