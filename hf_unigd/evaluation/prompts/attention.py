"""Attention from the summary token over an image (VladVA, figure 6)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...data.example import Messages
from ...modeling import UniGDForConditionalGeneration, UniGDProcessor
from ...modeling.configuration_unigd import attention_implementations


@dataclass(frozen=True)
class ImageAttention:
    """
    Attributes:
        weights (`torch.FloatTensor` of shape `(num_positions,)`): Attention from the summary token to each position
            from the first token of the image to its last, marks of rows and tiles included; the mean over layers and
            heads.
        grid: Rows and columns of the positions, or None if they are not one grid, as of an image that is cut into
            tiles.
    """

    weights: torch.Tensor
    grid: tuple[int, int] | None

    @property
    def share(self) -> float:
        """How much of all attention the image gets, from 0 to 1."""
        return float(self.weights.sum())

    @property
    def density(self) -> float:
        """The share of the positions that the attention is spread over: the exponential of the entropy of the weights,
        divided by their number. It is 1 if all weights are equal, and `1 / n` if one of `n` has all of it."""
        entropy = torch.special.entr(self.weights / self.weights.sum()).sum()
        return float(entropy.exp() / len(self.weights))


@torch.no_grad()
def image_attention(
    model: UniGDForConditionalGeneration, processor: UniGDProcessor, sequence: Messages, prompt_name: str = "query"
) -> ImageAttention:
    """
    Attention from the summary token to the first image of a sequence.

    Args:
        model: The model. Its eager attention is used, which returns weights.
        processor: Its processor, with the prompt.
        sequence: The sequence, which starts with an image.
        prompt_name: Name of the instruction that it begins with, if the processor has it.

    Raises:
        ValueError: the model does not return attention weights of all tokens to all tokens.
        SequenceError: the sequence cannot be processed.
    """
    batch = processor.process_sequences([sequence], prompt_name=prompt_name, sentence_ends=lambda text: [len(text)])
    _, start, end = batch.pop("slice_spans")[0].tolist()
    summary = int(batch["spans"][0, 2]) - 1
    inputs = batch.to(model.device, model.dtype)
    with _eager_attention(model.vlm):
        outputs = model.eval()(**inputs, output_attentions=True, skip_logits=True, use_cache=False)
    length = batch["input_ids"].shape[1]
    attentions = outputs.attentions or ()
    if not attentions or any(each is None or each.shape[-2:] != (length, length) for each in attentions):
        raise ValueError(
            f"{type(model.vlm).__name__} returns no attention weights of all {length} tokens (`output_attentions`), "
            "so this figure cannot be drawn. Leave it out with `--attention_images 0`."
        )
    layers = torch.stack([each[0, :, summary, start:end].float().mean(0).cpu() for each in attentions])
    return ImageAttention(layers.mean(0), _grid(end - start, inputs))


def _grid(count: int, inputs) -> tuple[int, int] | None:
    """Rows and columns of the `count` positions of an image, in the shape that is nearest to that of its pixels or
    patches."""
    sizes, pixels = inputs.get("image_grid_thw"), inputs["pixel_values"]
    if sizes is not None:
        height, width = sizes[0, 1:].tolist()
    elif pixels.ndim == 4 and len(pixels) == 1:
        height, width = pixels.shape[-2:]
    else:
        return None
    shapes = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    rows, columns = min(shapes, key=lambda shape: abs(math.log(shape[1] / shape[0] * height / width)))
    return (rows, columns) if abs(math.log(columns / rows * height / width)) < 0.1 else None


@contextmanager
def _eager_attention(vlm: PreTrainedModel) -> Iterator[None]:
    """Eager attention for a while: other implementations return no weights."""
    before = attention_implementations(vlm.config)
    vlm.set_attn_implementation("eager")
    try:
        yield
    finally:
        vlm.set_attn_implementation(before)
