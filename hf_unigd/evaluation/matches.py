"""Reads rows into what retrieval compares: the distinct items of both sides, and which match."""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from ..bulk import process_state
from ..data import Example, RowError, RowParser
from ..data.chats import as_list
from ..data.example import Messages, iter_image_parts
from ..data.features import without_decoding
from ..data.formats import CAPTION_ID, format_of
from ..data.images import open_image
from ..modeling.images_unigd import MAX_PIXELS
from .embedders import Embedder
from .items import Item, contradiction, items_of


logger = logging.getLogger(__name__)

_CAPTIONS = ("short_caption", "caption")


@dataclass(frozen=True)
class ImageSettings:
    """
    How the images of rows are opened.

    Attributes:
        folder: Folder that paths start from and must not leave.
        max_pixels: The largest width times height.
    """

    folder: str | Path | None = None
    max_pixels: int = MAX_PIXELS

    def open(self, value: Any) -> Any:
        return open_image(value, self.folder, self.max_pixels)


@dataclass
class RowReader:
    """
    Reads rows of any accepted format, an example for each caption of an image.

    Attributes:
        rows: The rows, map-style.
        parser: Turns a row with one caption into an example.
        images: How images are opened.
        check: Raises a [`RowError`] for an example that the model cannot process.
    """

    rows: Any
    parser: RowParser
    images: ImageSettings
    check: Callable[[Example], None]

    @classmethod
    def of(
        cls, rows: Any, embedder: Embedder, images: ImageSettings, short_caption_max_tokens: int = sys.maxsize
    ) -> "RowReader":
        """
        Args:
            rows: The rows.
            embedder: Has the instructions, and the tokens that no text may hold.
            images: How images are opened.
            short_caption_max_tokens: Where a `caption` begins to be a target of generation instead of a match. By
                default, every caption is a match, and with 0, every caption is a target.
        """
        parser = RowParser(
            len,
            short_caption_max_tokens=short_caption_max_tokens,
            long_caption_max_tokens=sys.maxsize,
            trust_caption_columns=True,
            max_image_pixels=images.max_pixels,
            image_folder=images.folder,
            find_reserved=embedder.find_reserved,
            instruction=embedder.instruction("query"),
            document_instruction=embedder.instruction("document"),
        )
        return cls(without_decoding(rows), parser, images, embedder.check)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, number: int) -> list[Example]:
        """
        The examples of a row. Its image is opened once.

        Raises:
            RowError: the row is bad.
        """
        try:
            row = self.rows[number]
        except Exception as error:  # of a transform, which may decode images here
            raise RowError(number, f"cannot be read: {error or type(error).__name__}") from error
        if not isinstance(row, Mapping):
            raise RowError(number, f"is a {type(row).__name__}, and a row is a dict of its columns.")
        try:
            parts = list(self._single_captions({name: value for name, value in row.items() if value is not None}))
        except ValueError as error:
            raise RowError(number, f"{str(error).removesuffix('.')}.") from error
        examples = [self.parser(part, number) for part in parts]
        for example in examples:
            self.check(example)
        return examples

    def _single_captions(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The row, once for each of its captions if it has a list of them."""
        kind = format_of(row)
        own = kind.under_own_names(row)
        name = next((each for each in _CAPTIONS if _are_texts(own.get(each))), None)
        if kind.name != "captions" or name is None:
            yield row
            return
        ids = own.get(CAPTION_ID)
        if ids is not None and len(as_list(ids)) != len(own[name]):
            raise ValueError(f"has {len(own[name])} captions in `{name}` and {len(as_list(ids))} in `{CAPTION_ID}`")
        own["image"] = self.images.open(own["image"])
        own.pop("caption_weights", None)  # of what training draws
        for place, caption in enumerate(own[name]):
            yield {**own, name: caption, **({CAPTION_ID: as_list(ids)[place]} if ids is not None else {})}


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(text, str) for text in value)


class Contents(Sequence):
    """
    Distinct contents of one side of retrieval. Texts are kept, and images are opened when they are read.

    Args:
        reader: Reads the rows again.
        side: `"anchor"` or `"positive"`.
        keys: The hash of each content ([`~hf_unigd.data.example.content_key`]).
        places: For each content, its row and the number of its example there.
        texts: The contents without images, by their place.
    """

    def __init__(
        self,
        reader: RowReader,
        side: str,
        keys: list[int],
        places: list[tuple[int, int]],
        texts: dict[int, Messages],
    ):
        self.reader, self.side, self.keys, self.places, self.texts = reader, side, keys, places, texts

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place):
        if place in self.texts:
            return self.texts[place]
        row, number = self.places[place]
        return getattr(self.reader.read(row)[number], self.side)


@dataclass
class Side:
    """
    The items of one side of retrieval.

    Attributes:
        contents: What is embedded: the distinct contents.
        items: Place in `contents` of each item. Equal captions of two images are two items and one content.
    """

    contents: Contents
    items: list[int]


@dataclass
class Matches:
    """
    What retrieval compares.

    Attributes:
        anchors, positives: The items of both sides.
        pairs (`torch.LongTensor` of shape `(p, 2)`): Places of the items that match.
        counts: Number of rows, of those left out because they have no match, and of those skipped because they are
            bad, by the names `rows`, `left_out` and `skipped`.
    """

    anchors: Side
    positives: Side
    pairs: torch.Tensor
    counts: dict[str, int]


@dataclass(frozen=True)
class _Part:
    """One side of an example: the item that it is of, and the content itself if it has no image."""

    item: Item
    text: Messages | None


@dataclass(frozen=True)
class _Match:
    """A match that a row holds: the row, the number of its example there, and both sides."""

    row: int
    number: int
    anchor: _Part
    positive: _Part


def read_matches(reader: RowReader, skip_bad_rows: bool = False, numbers: Sequence[int] | None = None) -> Matches:
    """
    Reads rows, on all processes that a launcher started, each its share. All call it, and receive the same.

    What one item is, [`~hf_unigd.evaluation.items.items_of`] says.

    Args:
        reader: Reads the rows.
        skip_bad_rows: Leave bad rows out, each with its reason in the log, instead of stopping.
        numbers: Which rows to read; all by default.

    Raises:
        RowError: a row is bad and `skip_bad_rows` is off.
        ValueError: no row has a match, or rows of equal ids have different content.
    """
    state = process_state()
    found: list[_Match] = []
    left_out, skipped = 0, []
    error: RowError | None = None
    numbers = range(len(reader)) if numbers is None else numbers
    for number in numbers[state.process_index :: state.num_processes]:
        try:
            own = list(_matches_of(reader, number))
        except RowError as reason:
            if not skip_bad_rows:
                error = reason
                break
            skipped.append(number)
            logger.warning("Skipped: %s", reason)
            continue
        left_out += not own
        found += own
    gathered = gather_object([(found, left_out, skipped, error)])
    errors = [each[3] for each in gathered if each[3] is not None]
    if errors:  # on all processes, so that none waits for the others
        raise min(errors, key=lambda each: each.row)
    matches = sorted((each for share in gathered for each in share[0]), key=lambda each: (each.row, each.number))
    counts = {
        "rows": len(numbers),
        "left_out": sum(share[1] for share in gathered),
        "skipped": sum(len(share[2]) for share in gathered),
    }
    anchors, anchor_places = _side(reader, "anchor", matches)
    positives, positive_places = _side(reader, "positive", matches)
    pairs = torch.tensor(list(zip(anchor_places, positive_places, strict=True)), dtype=torch.long).reshape(-1, 2)
    return Matches(anchors, positives, pairs, counts)


def _matches_of(reader: RowReader, number: int) -> Iterator[_Match]:
    for place, example in enumerate(reader.read(number)):
        if example.positive is not None:
            anchor, positive = items_of(example)
            yield _Match(number, place, _part(anchor, example.anchor), _part(positive, example.positive))


def _part(item: Item, messages: Messages) -> _Part:
    has_image = any(True for _ in iter_image_parts(messages))
    return _Part(item, None if has_image else messages)


def _side(reader: RowReader, side: str, matches: Iterable[_Match]) -> tuple[Side, list[int]]:
    """The items of a side in the order of the rows, and the item of each match."""
    of: Callable[[_Match], _Part] = lambda match: getattr(match, side)  # noqa: E731
    contents: dict[int, int] = {}
    items: dict[tuple[str, Any], int] = {}
    first: list[tuple[int, int]] = []
    texts: dict[int, Messages] = {}
    content_of: list[int] = []
    owners: list[_Match] = []
    places = []
    for match in matches:
        part = of(match)
        name, value, key = part.item
        content = contents.setdefault(key, len(contents))
        if content == len(first):
            first.append((match.row, match.number))
            if part.text is not None:
                texts[content] = part.text
        own = ("row", (match.row, match.number))
        item = items.setdefault(own if value is None else (name, value), len(items))
        if item == len(content_of):
            content_of.append(content)
            owners.append(match)
        elif content_of[item] != content:
            raise contradiction(f"`{name}` {value!r}", owners[item].row, match.row)
        places.append(item)
    return Side(Contents(reader, side, list(contents), first, texts), content_of), places
