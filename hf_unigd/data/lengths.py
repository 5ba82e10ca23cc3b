"""How many tokens texts and sequences have."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from ..modeling import UniGDProcessor


CHARACTERS_PER_TOKEN = 4


class TokenCounter:
    """Counts the tokens of texts, without special tokens.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    @lru_cache(maxsize=16)  # noqa: B019  # a row asks for the length of a caption more than once
    def __call__(self, text: str) -> int:
        if not self.tokenizer.is_fast:
            return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        # Half of the time of a call of the tokenizer is spent on what is not wanted here.
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        return len(backend.encode_batch_fast([text], add_special_tokens=False)[0])


def sequence_length(processor: UniGDProcessor, sequence: Any, target: str | None = None) -> int:
    """Estimates the number of tokens of a sequence and its target without tokenizing texts or reading pixels: image
    tokens are exact, text tokens are estimated from the number of characters.

    Args:
        processor: The processor, which knows how many tokens each image becomes.
        sequence: A sequence as [`UniGDProcessor.process_sequences`] takes it.
        target: The answer to it, if there is one.
    """
    characters, sizes = len(target or ""), []
    for part in _parts(sequence):
        if isinstance(part, Image.Image):
            sizes.append((part.height, part.width))
        elif isinstance(part, str):
            characters += len(part)
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens if sizes else []
    return characters // CHARACTERS_PER_TOKEN + sum(counts)


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yields the places of sequences in batches of about the same length, the longest first, to spare padding."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _parts(sequence: Any) -> Iterator[Any]:
    """The texts and images of a sequence at any depth, and what the processor will refuse."""
    if isinstance(sequence, dict):
        yield from _parts(next((sequence[name] for name in ("content", "image", "text") if name in sequence), None))
    elif isinstance(sequence, (list, tuple)):
        for part in sequence:
            yield from _parts(part)
    else:
        yield sequence
