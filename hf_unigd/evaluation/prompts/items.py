"""The images and captions that prompts are compared on."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from tqdm.auto import tqdm

from ...data import ExampleDataset, RowError, RowParser
from ...data.example import Messages, content_key, iter_parts
from ...data.features import without_decoding
from ...modeling import UniGDProcessor
from ...modeling.images_unigd import MAX_PIXELS


@dataclass(frozen=True)
class CaptionedImages:
    """
    Distinct images and distinct captions. Images are opened when they are read.

    Attributes:
        examples: The rows.
        images: Numbers of the rows with the images, in `examples`.
        texts: The captions.
        text_rows: Number of the row of each caption.
        keys: 63-bit hashes of the contents of the images and captions, in this order.
        matches (`torch.BoolTensor` of shape `(len(images), len(texts))`): Which captions belong to which images.
    """

    examples: ExampleDataset
    images: list[int]
    texts: list[Messages]
    text_rows: list[int]
    keys: list[int]
    matches: torch.Tensor

    def read(self, modality: str, places: Sequence[int]) -> tuple[list[Messages], list[int]]:
        """The images or captions at `places`, and the numbers of their rows."""
        if modality == "text":
            return [self.texts[place] for place in places], [self.text_rows[place] for place in places]
        rows = [self.images[place] for place in places]
        return [self.examples.parse(row).anchor for row in rows], rows

    def count(self, modality: str) -> int:
        """The number of images or captions."""
        return len(self.images if modality == "image" else self.texts)


def read_captioned_images(
    rows: Any,
    processor: UniGDProcessor,
    max_rows: int,
    image_folder: str | Path | None = None,
    max_image_pixels: int = MAX_PIXELS,
    show_progress: bool = True,
) -> CaptionedImages:
    """
    Reads images and their captions: all of a row without a long caption, and one short caption of a row with one.

    Args:
        rows: A dataset of captioned images.
        processor: Tells which texts hold reserved tokens.
        max_rows: How many rows to read, at equal distances. Of a stream, the first ones.
        image_folder: Folder that image paths start from and must not leave.
        max_image_pixels: The largest width times height of an image.
        show_progress: Whether to draw a progress bar.

    Raises:
        RowError: a row is bad, or is no image with a caption.
        ValueError: there are fewer than two different images or captions, so that there is nothing to compare.
    """
    if isinstance(rows, IterableDataset):
        rows = list(islice(without_decoding(rows), max_rows))
    parser = RowParser(
        len,
        short_caption_max_tokens=sys.maxsize,  # a caption of any length is a match
        long_caption_max_tokens=sys.maxsize,
        trust_caption_columns=True,
        image_folder=image_folder,
        max_image_pixels=max_image_pixels,
        find_reserved=processor.find_reserved,
    )
    examples = ExampleDataset(rows, parser)
    count = min(max_rows, len(examples))
    chosen = [place * len(examples) // count for place in range(count)]
    images: dict[int, int] = {}
    texts: dict[int, tuple[int, Messages]] = {}
    pairs = []
    for row in tqdm(chosen, desc="Reading", unit="row", disable=not show_progress):
        example = examples.parse(row)
        if example.positive is None or [part["type"] for _, part in iter_parts(example.anchor)] != ["image"]:
            raise RowError(row, "is no image with a short caption, which prompts are compared on.")
        image = content_key(example.anchor)
        images.setdefault(image, row)
        for text in [example.positive] if example.target else example.captions or [example.positive]:
            key = content_key(text)
            texts.setdefault(key, (row, text))
            pairs.append((image, key))
    if min(len(images), len(texts)) < 2:
        raise ValueError(
            f"The rows have {len(images)} different images and {len(texts)} different captions, and prompts are "
            "compared on at least two of each."
        )
    places = [{key: place for place, key in enumerate(keys)} for keys in (images, texts)]
    matches = torch.zeros(len(images), len(texts), dtype=torch.bool)
    for image, key in pairs:
        matches[places[0][image], places[1][key]] = True
    text_rows, contents = (list(each) for each in zip(*texts.values(), strict=True))
    return CaptionedImages(examples, list(images.values()), contents, text_rows, [*images, *texts], matches)
