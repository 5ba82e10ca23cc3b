"""What a row becomes, whatever its format was."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image


IMAGE, TEXT = 0, 1

# Chat messages as `UniGDProcessor.process_sequences` takes them: images are `{"type": "image", "image": PIL image}`.
Messages = list[dict[str, Any]]


class RowError(ValueError):
    """A row that cannot be used. The message names the row and says what to do."""

    def __init__(self, row: int, reason: str):
        super().__init__(f"Row {row} {reason}")
        self.row = row
        self.reason = reason

    def __reduce__(self):  # worker processes pickle exceptions by their `args`
        return type(self), (self.row, self.reason)


@dataclass(frozen=True)
class Slice:
    """One image or sentence of a sequence."""

    content: Image.Image | str

    @property
    def modality(self) -> int:
        """`IMAGE` (0) or `TEXT` (1), as the alignment kernel's `modalities`."""
        return TEXT if isinstance(self.content, str) else IMAGE

    @property
    def key(self) -> int:
        """A 63-bit hash of the sentence or the pixels: equal for equal content."""
        name = "text" if self.modality == TEXT else "image"
        return content_key([{"content": [{"type": name, name: self.content}]}])


@dataclass
class Example:
    """One training or evaluation example.

    Attributes:
        row: Index in the dataset, for messages.
        anchor: The sequence that is embedded, continued, or both.
        positive: The sequence that matches the anchor; `None` where the example has none.
        negatives: Sequences that must not match it.
        target: What the model learns to say after the anchor; `None` where nothing.
        prompted: Whether the anchor is embedded, at its prompt where the processor has one.
        slices: Images and sentences of the anchor and its target, in order; empty where nobody asked for them.
        slice_features: What the teachers see of them, `(len(slices), width)`; `None` where that is not known yet.
        epoch: Pass over the data, for choices that vary with it.
    """

    row: int
    anchor: Messages
    positive: Messages | None = None
    negatives: list[Messages] = field(default_factory=list)
    target: str | None = None
    prompted: bool = True
    slices: list[Slice] = field(default_factory=list)
    slice_features: torch.Tensor | None = None
    epoch: int = 0


def content_key(messages: Messages) -> int:
    """A 63-bit hash of the texts and pixels of a sequence: equal for equal content, for masking duplicates."""
    digest = hashlib.blake2b(digest_size=8)
    for turn in messages:
        for part in turn["content"]:
            if part["type"] == "image":
                image: Image.Image = part["image"]
                digest.update(f"{image.mode}{image.size}".encode())
                digest.update(image.tobytes())
            else:
                digest.update(part["text"].encode())
            digest.update(b"\0")
    return int.from_bytes(digest.digest(), "big") >> 1
