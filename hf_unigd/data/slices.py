"""Cutting a sequence into slices: one image, or one sentence (Sugar, section 3.2)."""

from dataclasses import dataclass
from itertools import accumulate

import sentencex

from .example import Messages, Slice


@dataclass(frozen=True)
class SentenceSplitter:
    """Sentences of a text by the `sentencex` library, which knows some 250 languages' abbreviations and stops.

    Attributes:
        language: Two-letter code. An unknown one is split by the rules that all languages share.
    """

    language: str = "en"

    def __call__(self, text: str) -> list[int]:
        """Where the sentences of `text` end, in characters, without the white space that follows each."""
        pieces = list(sentencex.segment(self.language, text))
        ends = accumulate(len(piece) for piece in pieces)
        return [
            end - len(piece) + len(piece.rstrip()) for piece, end in zip(pieces, ends, strict=True) if piece.strip()
        ]

    def split(self, text: str) -> list[str]:
        """The sentences of `text`, without the white space around them."""
        ends = self(text)
        return [text[start:end].strip() for start, end in zip([0, *ends], ends, strict=False)]


def slices_of(messages: Messages, target: str | None, splitter: SentenceSplitter) -> list[Slice]:
    """The slices of a sequence and of what is said after it, in the order of the processor's `slice_spans`.

    The system's text is no slice: it is the same in every conversation.

    Args:
        messages: The sequence.
        target: What follows it, if anything.
        splitter: Cuts texts into sentences.

    Raises:
        ValueError: there is no slice.
    """
    slices = []
    for turn in messages:
        for part in turn["content"]:
            if part["type"] == "image":
                slices.append(Slice(part["image"]))
            elif turn["role"] != "system":
                slices += [Slice(sentence) for sentence in splitter.split(part["text"])]
    slices += [Slice(sentence) for sentence in splitter.split(target or "")]
    if not slices:
        raise ValueError("has no slices: it needs at least one image or sentence")
    return slices
