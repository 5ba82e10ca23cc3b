"""Divides the output of a vision tower into images, whatever its form, and joins it again."""

import torch
from transformers.utils import ModelOutput


ImageFeatures = dict[str, torch.Tensor]  # of one image, by the names of `split_images`

_LISTED, _SHARED = "listed", "shared"


def for_language_model(features: ModelOutput) -> ModelOutput:
    """The output of a vision tower without the states of the tower's own layers, which would fill the memory while the
    chunks of a step wait."""
    kept = ModelOutput()
    for name in features.keys() - {"last_hidden_state", "hidden_states", "attentions"}:
        kept[name] = features[name]
    return kept


def split_images(features: ModelOutput, lengths: list[int]) -> list[ImageFeatures]:
    """
    Divides the output of a vision tower into images. [`join_images`] is the inverse.

    transformers' towers return the features of all images as one tensor whose first dimension goes over images, tiles
    or tokens, or as a list of such tensors, for each image, tile or row. `pooler_output` is one of these; other
    outputs may be lists of them, one for each layer, or may not depend on the images, as Ovis2's
    `visual_indicator_features`.

    Args:
        features: The output for all images.
        lengths: The number of tokens of each image.

    Returns:
        For each image, its tensors by name. A name is that of the output, followed by the number of the layer and by
        `listed` or `shared` if they apply, as in `deepstack_features.0.listed`.

    Raises:
        ValueError: `pooler_output` or a layer has another number of tokens than the images.
    """
    images: list[ImageFeatures] = [{} for _ in lengths]
    for name, value in features.items():
        has_layers = name != "pooler_output" and isinstance(value, (list, tuple))
        layers = {f"{name}.{number}": layer for number, layer in enumerate(value)} if has_layers else {name: value}
        for part, layer in layers.items():
            is_listed = isinstance(layer, (list, tuple))
            tensors = _split_tokens(torch.cat(tuple(layer)) if is_listed else layer, lengths)
            form = f".{_LISTED}" if is_listed else ""
            if tensors is None:
                if name == "pooler_output" or has_layers:
                    raise ValueError(
                        f"`vision_cache` cannot store `{name}` of the vision tower's output: it "
                        f"cannot be divided into {len(lengths)} images of {lengths} tokens. Leave `vision_cache` out: "
                        "a frozen tower still runs once per step."
                    )
                tensors, form = [layer] * len(lengths), f".{_SHARED}"
            for image, tensor in zip(images, tensors, strict=True):
                image[part + form] = tensor
    return images


def join_images(images: list[ImageFeatures]) -> ModelOutput:
    """Makes the output of a vision tower from what [`split_images`] made of it.

    Raises:
        ValueError: an output that cannot be divided into images is not the same for all of them.
    """
    features = ModelOutput()
    for stored in sorted(images[0], key=lambda name: (len(name), name)):  # layer 2 before layer 10
        tensors = [image[stored] for image in images]
        name, *form = stored.split(".")
        if _SHARED in form:
            if not all(torch.equal(tensor, tensors[0]) for tensor in tensors):
                raise ValueError(
                    f"`vision_cache` cannot keep `{name}`, which depends on the images beside an image. Leave "
                    "`vision_cache` out: a frozen tower still runs once per step."
                )
            features[name] = tensors[0]
            continue
        value = tensors if _LISTED in form else torch.cat(tensors)
        is_layer = bool(form) and form[0].isdigit()
        features[name] = [*features.get(name, []), value] if is_layer else value
    return features


def _split_tokens(features: torch.Tensor, lengths: list[int]) -> list[torch.Tensor] | None:
    """The features of each image, if the first dimension can be split so that each has as many as its tokens."""
    per_entry = features.shape[1:-1].numel()
    if features.shape[:-1].numel() != sum(lengths) or any(length % per_entry for length in lengths):
        return None
    return list(features.split([length // per_entry for length in lengths]))
