"""Whether two sequences are the same to people, by their pictures and their texts."""

import unicodedata
from collections.abc import Iterable

import xxhash
from PIL import Image as PILImage

from ..data.example import Messages, image_key, iter_parts
from ..modeling.instructions_unigd import without_instruction


def sequence_key(parts: Iterable[str | PILImage.Image]) -> int:
    """
    A 63-bit hash of the pixels and the normalised texts of a sequence. Texts that follow one another count as one, and
    neither case, white space and Unicode's forms of characters nor a final punctuation mark count.
    """
    pieces: list[list[str]] = [[]]  # texts, between pictures
    digest = xxhash.xxh3_64()
    for part in parts:
        if isinstance(part, str):
            pieces[-1].append(part)
        else:
            digest.update(f"{len(pieces)} {image_key({'image': part})}\0".encode())
            pieces.append([])
    for texts in pieces:
        digest.update(f"{normalised(' '.join(texts))}\0".encode())
    return digest.intdigest() >> 1


def messages_key(messages: Messages) -> int:
    """The [`sequence_key`] of chat messages, of which neither roles nor an instruction count."""
    parts = (part for _, part in iter_parts(without_instruction(messages)))
    return sequence_key(part["text"] if part["type"] == "text" else part["image"] for part in parts)


def normalised(text: str) -> str:
    """A text without what distinguishes it for no reader."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .!?")
