"""Cuts a sequence into slices. A slice is one image or one sentence (Sugar, section 3.2)."""

from dataclasses import dataclass
from itertools import accumulate

import sentencex

from ..modeling.instructions_unigd import is_instruction
from .example import Messages, Slice, iter_parts


@dataclass(frozen=True)
class SentenceSplitter:
    """Splits a text into sentences with the `sentencex` library.

    The library knows the abbreviations and the full stops of about 250 languages.

    Attributes:
        language: Two-letter code of the language. For an unknown code the rules that all languages share are used.
    """

    language: str = "en"

    def __call__(self, text: str) -> list[int]:
        """Returns the character offset at which each sentence of `text` ends, before the white space that follows."""
        pieces = list(sentencex.segment(self.language, text))
        ends = accumulate(len(piece) for piece in pieces)
        return [
            end - len(piece) + len(piece.rstrip()) for piece, end in zip(pieces, ends, strict=True) if piece.strip()
        ]

    def split(self, text: str) -> list[str]:
        """Returns the sentences of `text`, stripped of the white space around them."""
        ends = self(text)
        return [text[start:end].strip() for start, end in zip([0, *ends], ends, strict=False)]


def slices_of(messages: Messages, target: str | None, splitter: SentenceSplitter) -> list[Slice]:
    """Returns the slices of a sequence and of its target, in the order of the processor's `slice_spans`.

    The text of the system message has no slices, because it is the same in every conversation, and neither has an
    instruction.

    Args:
        messages: The sequence.
        target: The text that follows the sequence, if any.
        splitter: Splits texts into sentences.

    Raises:
        ValueError: there is no slice. The message continues "Row 3 ...".
    """
    slices = []
    for role, part in iter_parts(messages):
        if part["type"] == "image":
            slices.append(Slice(part))
        elif role != "system" and not is_instruction(part):
            slices += _sentences(part["text"], splitter)
    slices += _sentences(target or "", splitter)
    if not slices:
        raise ValueError("has no slices: it needs at least one image or sentence")
    return slices


def _sentences(text: str, splitter: SentenceSplitter) -> list[Slice]:
    return [Slice({"type": "text", "text": sentence}) for sentence in splitter.split(text)]
