"""The images and captions that prompts are compared on."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from datasets import IterableDataset

from ...data import Example, RowError, RowParser
from ...data.example import Messages, iter_parts
from ...data.features import without_decoding
from ...modeling import UniGDProcessor
from ..matches import ImageSettings, Matches, RowReader, Side, read_matches


@dataclass(frozen=True)
class CaptionedImages:
    """
    Images and their captions. Each distinct content is run once, and images are opened when they are read.

    Attributes:
        found: The items of both sides, and which match ([`~hf_unigd.evaluation.matches.read_matches`]).
    """

    found: Matches

    def side(self, modality: str) -> Side:
        """The images or the captions."""
        return self.found.anchors if modality == "image" else self.found.positives

    def read(self, modality: str, places: Sequence[int]) -> tuple[list[Messages], list[int]]:
        """The distinct images or captions at `places`, and the numbers of their rows."""
        contents = self.side(modality).contents
        return [contents[place] for place in places], [contents.places[place][0] for place in places]

    def count(self, modality: str) -> int:
        """The number of distinct images or captions."""
        return len(self.side(modality).contents)

    @property
    def keys(self) -> list[int]:
        """63-bit hashes of the distinct images and captions, in this order."""
        return [*self.found.anchors.contents.keys, *self.found.positives.contents.keys]

    @property
    def matches(self) -> torch.Tensor:
        """Which captions belong to which images: `torch.BoolTensor` of shape `(num_images, num_captions)`. Both are
        items: a caption of two images is two."""
        table = torch.zeros(len(self.found.anchors.items), len(self.found.positives.items), dtype=torch.bool)
        table[tuple(self.found.pairs.T)] = True
        return table


def read_captioned_images(
    rows: Any, processor: UniGDProcessor, max_rows: int, images: ImageSettings | None = None
) -> CaptionedImages:
    """
    Reads images and their captions, as an evaluation does: what one item is, is decided alike.

    Args:
        rows: A dataset of captioned images.
        processor: Tells which texts hold reserved tokens.
        max_rows: How many rows to read, at equal distances. Of a stream, the first ones.
        images: How images are opened.

    Raises:
        RowError: a row is bad, or is no image with a caption.
        ValueError: there are fewer than two different images or captions, so that there is nothing to compare.
    """
    if isinstance(rows, IterableDataset):
        rows = list(islice(without_decoding(rows), max_rows))
    images = images or ImageSettings()
    parser = RowParser(
        len,
        short_caption_max_tokens=sys.maxsize,  # a caption of any length is a match
        long_caption_max_tokens=sys.maxsize,
        trust_caption_columns=True,
        image_folder=images.folder,
        max_image_pixels=images.max_pixels,
        find_reserved=processor.find_reserved,
    )
    count = min(max_rows, len(rows))
    chosen = [place * len(rows) // count for place in range(count)]
    found = CaptionedImages(read_matches(RowReader(without_decoding(rows), parser, images, _check), numbers=chosen))
    if min(found.count("image"), found.count("text")) < 2:
        raise ValueError(
            f"The rows have {found.count('image')} different images and {found.count('text')} different captions, and "
            "prompts are compared on at least two of each."
        )
    return found


def _check(example: Example) -> None:
    if example.positive is None or [part["type"] for _, part in iter_parts(example.anchor)] != ["image"]:
        raise RowError(example.row, "is no image with a short caption, which prompts are compared on.")
