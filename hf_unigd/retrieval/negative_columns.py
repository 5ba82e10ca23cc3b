"""The columns in which the rows of each format hold negatives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from datasets import Features, Image, LargeList, List, Value

from ..data.chats import IMAGE_TAG
from ..data.formats import FORMATS
from ..data.published import MMEB_IMAGE_TAG


Parts = Sequence[str | bytes]  # texts and encoded images, in order

_TEXTS = ("string", "large_string")


class NegativeColumns(Protocol):
    """Writes the negatives of rows of a format."""

    @property
    def features(self) -> Features:
        """The columns to add."""

    def holds(self, parts: Parts) -> bool:
        """Whether a negative of these parts can be written."""

    def values(self, negatives: Sequence[Parts]) -> dict[str, Any]:
        """The values of the columns in a row."""


@dataclass(frozen=True)
class NumberedColumns:
    """`negative_1`, `negative_2`, ..., each of a text, or each of an image."""

    count: int
    modality: str

    @property
    def features(self) -> Features:
        kind = Value("string") if self.modality == "text" else Image()
        return Features({f"negative_{place}": kind for place in range(1, self.count + 1)})

    def holds(self, parts: Parts) -> bool:
        return len(parts) == 1 and isinstance(parts[0], str) == (self.modality == "text")

    def values(self, negatives: Sequence[Parts]) -> dict[str, Any]:
        return {name: _stored(parts[0]) for name, parts in zip(self.features, negatives, strict=True)}


@dataclass(frozen=True)
class ChatColumns:
    """ms-swift's `negative_messages` and `negative_images`: a chat for each negative."""

    @property
    def features(self) -> Features:
        turn = {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        return Features({"negative_messages": List(List(turn)), "negative_images": List(List(Image()))})

    def holds(self, parts: Parts) -> bool:
        return bool(parts) and not any(isinstance(part, str) and IMAGE_TAG in part for part in parts)

    def values(self, negatives: Sequence[Parts]) -> dict[str, Any]:
        images = [[_stored(part) for part in parts if not isinstance(part, str)] for parts in negatives]
        contents = [
            [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
            for parts in negatives
        ]
        return {
            "negative_messages": [[{"role": "user", "content": content}] for content in contents],
            "negative_images": images,
        }


@dataclass(frozen=True)
class MmebColumns:
    """MMEB's `neg_text` and `neg_image_path`, as lists: at most one image at its tag in a text."""

    @property
    def features(self) -> Features:
        return Features({"neg_text": List(Value("string")), "neg_image_path": List(Image())})

    def holds(self, parts: Parts) -> bool:
        texts = [part for part in parts if isinstance(part, str)]
        # Texts that follow one another would become one.
        follow = any(isinstance(a, str) and isinstance(b, str) for a, b in pairwise(parts))
        has_tag = any(MMEB_IMAGE_TAG in text for text in texts)
        return bool(parts) and len(parts) - len(texts) <= 1 and not follow and not has_tag

    def values(self, negatives: Sequence[Parts]) -> dict[str, Any]:
        images = [[_stored(part) for part in parts if not isinstance(part, str)] for parts in negatives]
        texts = ["".join(part if isinstance(part, str) else MMEB_IMAGE_TAG for part in parts) for parts in negatives]
        return {"neg_text": texts, "neg_image_path": [found[0] if found else None for found in images]}


def negative_columns(features: Features, count: int) -> dict[str, NegativeColumns]:
    """
    How the rows of a dataset hold negatives, by the names of the formats that they may have.

    Args:
        features: Those of the dataset.
        count: Number of negatives of a row.

    Raises:
        ValueError: no row can have a match and negatives, or a column of negatives is there already, or would hold
            both texts and images.
    """
    found: dict[str, NegativeColumns] = {}
    fitting = {each.name for each in FORMATS if each.fits(features)}
    if "chat" in fitting and "positive_messages" in features:
        found["chat"] = ChatColumns()
    if "mmeb" in fitting:
        found["mmeb"] = MmebColumns()
    if "pair" in fitting:
        found["pair"] = NumberedColumns(count, _modality(features["positive"]))
    if "captions" in fitting:
        found["captions"] = NumberedColumns(count, "text")
    if not found:
        raise ValueError(
            f"Rows with the columns {', '.join(sorted(features))} have no match, or a format without negatives. Give "
            "them the columns `anchor` and `positive`, `image` and `short_caption`, `messages` and "
            "`positive_messages`, or MMEB's (`--rename_columns old:new`)."
        )
    if found.get("pair", found.get("captions")) != found.get("captions", found.get("pair")):
        raise ValueError(
            "The dataset has captions, and pairs whose `positive` is an image, while columns of negatives hold either "
            "texts or images. Mine each on its own."
        )
    for name in (name for columns in found.values() for name in columns.features):
        if name in features:
            raise ValueError(
                f"The dataset has a column `{name}` already. Rename it (`--rename_columns {name}:other_{name}`), or "
                "remove it."
            )
    return found


def _modality(feature: Any) -> str:
    """What a column `positive` holds."""
    if isinstance(feature, (List, LargeList)):
        feature = feature.feature
    if isinstance(feature, Value) and feature.dtype in _TEXTS:
        return "text"
    is_image = isinstance(feature, Image) or (isinstance(feature, Mapping) and feature.keys() & {"bytes", "path"})
    if is_image or (isinstance(feature, Value) and "binary" in feature.dtype):
        return "image"
    raise ValueError(
        f"The column `positive` holds {feature}, and columns of negatives hold either texts or images. Give sequences "
        "of both as chats, in the columns `messages` and `positive_messages`."
    )


def _stored(part: str | bytes) -> Any:
    return part if isinstance(part, str) else {"bytes": part, "path": None}
