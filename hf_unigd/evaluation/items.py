"""What one item of retrieval is, for `hf-unigd evaluate` and the evaluation during training alike."""

from typing import Any, NamedTuple

import xxhash

from ..data import Example, RowError
from ..data.example import content_key
from ..data.formats import CAPTION_ID, IMAGE_ID


class Item(NamedTuple):
    """
    One side of a match.

    Attributes:
        name: What tells it from others: `"image_id"`, `"caption_id"` or `"content"`.
        value: The id, or the hash of the content. None for an item of its own, whatever its content.
        content: The hash of its content ([`~hf_unigd.data.example.content_key`]).
    """

    name: str
    value: Any
    content: int

    @property
    def key(self) -> int:
        """A 63-bit hash, equal for one item; -1 for an item of its own."""
        return -1 if self.value is None else xxhash.xxh3_64_intdigest(f"{self.name} {self.value!r}".encode()) >> 1


def items_of(example: Example) -> tuple[Item, Item]:
    """
    The items that an example with a positive matches: its anchor's and its positive's.

    What an item is, the dataset says itself where it can: rows of equal `image_id` show one image, and rows of equal
    `caption_id` hold one caption. Without these columns, equal images are one item, and every caption of an image is
    an item of its own, as in Karpathy's protocol. Of rows that are no captioned images, equal contents are one item.

    Raises:
        RowError: an id is neither a number nor a text.
    """
    anchor, positive = content_key(example.anchor), content_key(example.positive or [])
    if not example.captions:
        return Item("content", anchor, anchor), Item("content", positive, positive)
    image_id, caption_id = _id(example, IMAGE_ID), _id(example, CAPTION_ID)
    image = Item("content", anchor, anchor) if image_id is None else Item(IMAGE_ID, image_id, anchor)
    return image, Item(CAPTION_ID, caption_id, positive)


def _id(example: Example, name: str) -> Any:
    """The id of an example, together with the dataset that it is of, if it is one of several."""
    value = getattr(example, name)
    if value is None:
        return None
    if not isinstance(value, (str, int)):
        raise RowError(
            example.row,
            f"has a `{name}` of type {type(value).__name__}, but a number or a text is needed, for each of several "
            "captions one.",
            example.source,
        )
    return value if example.source is None else (example.source, value)


def contradiction(shared: str, first: int, second: int) -> ValueError:
    """What is raised where two rows share an id, and have different contents."""
    return ValueError(
        f"Rows {first} and {second} have the same {shared} and different content. Correct the ids, or remove the "
        "column."
    )
