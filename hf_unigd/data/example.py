"""The example that every row becomes, whatever its format."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import xxhash
from PIL import Image


IMAGE, TEXT = 0, 1

# Chat messages as `UniGDProcessor.process_sequences` takes them. Each has a `role` and a `content`, a list of parts: a
# text is `{"type": "text", "text": str}`; an image is `{"type": "image", "image": PIL image}`, to which `image_key`
# adds its `"key"`; and an instruction, with which the first user's turn of what is embedded may begin, is
# `{"type": "instruction", "text": str}`.
Messages = list[dict[str, Any]]


class RowError(ValueError):
    """Raised for a row that cannot be used.

    Args:
        row: Index of the row in the dataset.
        reason: Why the row cannot be used and what to do about it, as the continuation of "Row 3 ...".
        source: Name of the dataset, if it is one of several.
    """

    # torch raises the error of a data loader's worker again as `type(error)(message=...)` if its type has a `message`.
    # What it passes is the traceback of the worker, which ends with the error.
    message = True

    def __init__(self, row: int = 0, reason: str = "", source: str | None = None, *, message: str | None = None):
        if message is not None:
            number, _, reason = message.rpartition("RowError: Row ")[2].strip().partition(" ")
            row = int(number)
        super().__init__(f"Row {row} {reason}" if source is None else f"Row {row} of {source} {reason}")
        self.row = row
        self.reason = reason
        self.source = source

    def __reduce__(self):  # by default an exception is unpickled from its `args`, which hold the message alone
        return type(self), (self.row, self.reason, self.source)


@dataclass(frozen=True)
class Slice:
    """One image or one sentence of a sequence.

    Attributes:
        part: The image as it is in the messages, or `{"type": "text", "text": str}` with the sentence.
    """

    part: dict[str, Any]

    @property
    def content(self) -> Image.Image | str:
        """The image or the sentence."""
        return self.part[self.part["type"]]

    @property
    def modality(self) -> int:
        """`IMAGE` (0) or `TEXT` (1), the codes that the alignment kernel takes as `modalities`."""
        return IMAGE if self.part["type"] == "image" else TEXT

    @property
    def key(self) -> int:
        """A 63-bit hash of the sentence or of the pixels. Slices of equal content have equal keys."""
        return content_key([{"role": "user", "content": [self.part]}])


class InputSequence(NamedTuple):
    """
    A sequence as [`UniGDProcessor.process_sequences`] takes it.

    Attributes:
        messages: The sequence.
        target: The text that the model learns to generate after it.
        prompted: Whether it is embedded, at its embedding prompt if the processor has one.
        label_history: Whether the answers in `messages` are learned too.
    """

    messages: Messages
    target: str | None = None
    prompted: bool = True
    label_history: bool = False


@dataclass
class Example:
    """One training or evaluation example.

    Attributes:
        row: Index of the row in the dataset. Errors and logs name it.
        anchor: The sequence that is embedded, continued with `target`, or both.
        positive: The sequence that matches the anchor. `None` if the example has no match.
        negatives: Sequences that do not match the anchor.
        captions: All known captions of the anchor, an image. None of them is contrasted with it, unless as `positive`.
        image_id: What the row calls the image of the anchor, as it stands there. Evaluation alone reads it.
        caption_id: The same of the caption in `positive`.
        target: The text that the model learns to generate after the anchor. `None` if there is none.
        prompted: Whether the anchor is embedded, at its embedding prompt if the processor has one.
        is_chat: Whether `target` is the answer of a chat, which never follows an embedding prompt, because it is asked
            for without one. A long caption follows the prompt.
        label_history: Whether the answers in the anchor are learned like `target`.
        slices: Images and sentences of the anchor and of the target, in order. Empty if the parser has no splitter.
        slice_features: Teacher features of the slices, of shape `(len(slices), width)`. `None` if they were not
            computed beforehand.
        epoch: Current pass over the data, for random choices that differ between epochs.
        source: Name of the dataset, if it is one of several.
        position: Where its stream stands after it ([`ExampleStream`]). None outside a stream.
    """

    row: int
    anchor: Messages
    positive: Messages | None = None
    negatives: list[Messages] = field(default_factory=list)
    captions: list[Messages] = field(default_factory=list)
    image_id: Any = None
    caption_id: Any = None
    target: str | None = None
    prompted: bool = True
    is_chat: bool = False
    label_history: bool = False
    slices: list[Slice] = field(default_factory=list)
    slice_features: torch.Tensor | None = None
    epoch: int = 0
    source: str | None = None
    position: dict[str, Any] | None = None

    def anchor_sequences(self, position: str, learned: bool = True, embedded: bool = True) -> list[InputSequence]:
        """
        Returns the sequences of the anchor: one, or two for a chat that is answered, and embedded at a prompt. The
        first is the one whose slices are compared.

        Args:
            position: `embedding_position` of the processor.
            learned: Whether targets are processed.
            embedded: Whether the anchor is embedded.
        """
        if not learned or (self.target is None and not self.label_history):
            return [InputSequence(self.anchor, prompted=self.prompted)]
        apart = self.is_chat and self.prompted and position == "prompt"
        whole = InputSequence(self.anchor, self.target, self.prompted and not apart, self.label_history)
        return [whole, InputSequence(self.anchor)] if apart and embedded else [whole]


def iter_parts(messages: Messages) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every part of every message, in order, with the role of its message."""
    for message in messages:
        for part in message["content"]:
            yield message["role"], part


def iter_images(messages: Messages) -> Iterator[Image.Image]:
    """Yields the images of all messages, in order."""
    for part in iter_image_parts(messages):
        yield part["image"]


def iter_image_parts(messages: Messages) -> Iterator[dict[str, Any]]:
    """Yields the parts of all messages that are images, in order."""
    for _, part in iter_parts(messages):
        if part["type"] == "image":
            yield part


def image_key(part: dict[str, Any]) -> str:
    """A 128-bit hash of the mode, size and pixels of an image, in hexadecimal digits. Whether a row holds a path,
    bytes or a decoded image does not count.

    Masks, the features of slices, and the cache of the vision tower share it. It is computed once, and kept in the
    part.
    """
    if "key" not in part:
        image: Image.Image = part["image"]
        digest = xxhash.xxh3_128(f"{image.mode}{image.size}".encode())
        digest.update(image.tobytes())
        part["key"] = digest.hexdigest()
    return part["key"]


def content_key(messages: Messages) -> int:
    """A 63-bit hash of the texts and pixels of a sequence, by which duplicates are found and masked.

    Sequences of equal content have equal keys. Roles do not count.
    """
    digest = xxhash.xxh3_64()
    for _, part in iter_parts(messages):
        content = image_key(part) if part["type"] == "image" else part["text"]
        digest.update(f"{part['type']} {content}\0".encode())
    return digest.intdigest() >> 1
