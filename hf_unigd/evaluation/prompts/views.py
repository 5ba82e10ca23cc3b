"""How one pair of prompts looks inside a model: the likeliest next tokens, and the attention to images."""

from dataclasses import dataclass

import torch

from ...data import RowError
from ...data.example import Messages
from ...modeling import SequenceError, UniGDForConditionalGeneration, UniGDProcessor
from .attention import ImageAttention, image_attention


TOP_TOKENS = 10


@dataclass(frozen=True)
class ModelView:
    """
    Attributes:
        tokens: By modality, the likeliest tokens at the summary token and their mean probabilities.
        attention: The attention to each image.
    """

    tokens: dict[str, list[tuple[str, float]]]
    attention: list[ImageAttention]


def top_tokens(processor: UniGDProcessor, probabilities: torch.Tensor, count: int = TOP_TOKENS):
    """
    The likeliest tokens, as text that a figure can show, and their probabilities.

    Args:
        processor: The processor of the model.
        probabilities (`torch.FloatTensor` of shape `(vocab_size,)`): A next-token distribution.
        count: How many tokens.

    Returns:
        `list[tuple[str, float]]`, the likeliest first.
    """
    values, ids = probabilities.topk(count)
    # A row of the table that no token has is shown by its number.
    texts = [processor.tokenizer.decode([token]) or f"<{token}>" for token in ids.tolist()]
    return list(zip([repr(text)[1:-1] for text in texts], values.tolist(), strict=True))


def view_attention(
    model: UniGDForConditionalGeneration, processor: UniGDProcessor, images: list[Messages], rows: list[int]
) -> list[ImageAttention]:
    """
    The attention to each image from the summary token of a prompt.

    Args:
        model: The model.
        processor: Its processor, with the prompt.
        images: Sequences of an image.
        rows: Number of the row of each, for errors.

    Raises:
        RowError: an image cannot be processed.
        ValueError: the model returns no attention weights.
    """
    found = []
    for row, image in zip(rows, images, strict=True):
        try:
            found.append(image_attention(model, processor, image))
        except SequenceError as error:
            raise RowError(row, error.reason) from error
    return found
