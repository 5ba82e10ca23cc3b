"""How long sequences will be, without tokenizing them or touching a pixel."""

from collections.abc import Iterator
from typing import Any

from PIL import Image

from ..modeling import UniGDProcessor


CHARACTERS_PER_TOKEN = 4


def sequence_length(processor: UniGDProcessor, sequence: Any, target: str | None = None) -> int:
    """About how many tokens a sequence and its target have: the image tokens exactly, texts by their characters.

    Args:
        processor: Knows how many tokens an image becomes.
        sequence: Whatever [`UniGDProcessor.process_sequences`] takes.
        target: What follows it, if anything.
    """
    characters, sizes = len(target or ""), []
    for part in _parts(sequence):
        if isinstance(part, Image.Image):
            sizes.append((part.height, part.width))
        elif isinstance(part, str):
            characters += len(part)
    counts = processor.vlm_processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens if sizes else []
    return characters // CHARACTERS_PER_TOKEN + sum(counts)


def _parts(sequence: Any) -> Iterator[Any]:
    """Texts and images, however deep; anything else is for the processor to refuse."""
    if isinstance(sequence, dict):
        yield from _parts(next((sequence[name] for name in ("content", "image", "text") if name in sequence), None))
    elif isinstance(sequence, (list, tuple)):
        for part in sequence:
            yield from _parts(part)
    else:
        yield sequence
