"""The vision tower: which parameters it has, and its features computed once where it is frozen."""

from typing import Any

import torch

from ..modeling import UniGDForConditionalGeneration


def vision_parameters(model: UniGDForConditionalGeneration) -> list[torch.nn.Parameter]:
    """Parameters of the backbone outside its language model: the vision tower and its projector."""
    language = {id(parameter) for parameter in model.vlm.get_decoder().parameters()}
    language |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    return [parameter for parameter in model.vlm.parameters() if id(parameter) not in language]


@torch.no_grad()
def with_image_features(model: UniGDForConditionalGeneration, chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same chunks with `image_features` in place of their pictures' pixels."""
    return [_with_image_features(model, chunk) if "pixel_values" in chunk else chunk for chunk in chunks]


def _with_image_features(model, chunk):
    features = model.image_features(**chunk)
    return {**{name: value for name, value in chunk.items() if name != "pixel_values"}, "image_features": features}
