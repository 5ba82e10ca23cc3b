"""How long sequences will be, without tokenizing them or touching a pixel."""

from ..data.example import Messages
from ..modeling import UniGDProcessor


CHARACTERS_PER_TOKEN = 4


def sequence_length(processor: UniGDProcessor, messages: Messages, target: str | None = None) -> int:
    """About how many tokens a sequence and its target have: the image tokens exactly, texts by their characters."""
    parts = [part for turn in messages for part in turn["content"]]
    characters = sum(len(part["text"]) for part in parts if part["type"] == "text") + len(target or "")
    sizes = [(part["image"].height, part["image"].width) for part in parts if part["type"] == "image"]
    counts = processor.vlm_processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens if sizes else []
    return characters // CHARACTERS_PER_TOKEN + sum(counts)
