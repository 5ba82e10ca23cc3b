"""The vision tower: its parameters, and its features, which are computed once if it is frozen."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..bulk.image_features import for_language_model
from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from .collator import UniGDDataCollator
from .stored_images import StoredImages
from .vision_cache import VisionFeatureCache


Chunk = dict[str, Any]


def vision_parameters(model: UniGDForConditionalGeneration) -> list[torch.nn.Parameter]:
    """Returns the parameters of the vision tower and its projector: all but those of the language model."""
    language = {id(parameter) for parameter in model.vlm.get_decoder().parameters()}
    language |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    return [parameter for parameter in model.vlm.parameters() if id(parameter) not in language]


def is_frozen(model: UniGDForConditionalGeneration) -> bool:
    """Returns whether the vision tower and its projector are frozen completely."""
    return not any(parameter.requires_grad for parameter in vision_parameters(model))


@torch.no_grad()
def with_image_features(
    model: UniGDForConditionalGeneration, chunk: Chunk, cache: VisionFeatureCache | None = None
) -> Chunk:
    """
    Returns the chunk with `image_features` in place of `pixel_values`. The chunk of a backbone that takes no features
    is returned as it is, and its tower runs in every forward pass.

    Args:
        model: The model, whose vision tower is frozen.
        chunk: Model inputs. With a `cache`, they include the `image_keys` of their images, and they have no
            `pixel_values` if the features of all of them are stored.
        cache: Features of earlier epochs and runs, if they are kept.

    Raises:
        RuntimeError: there are neither pixels nor features.
    """
    chunk = dict(chunk)
    keys = chunk.pop("image_keys", [])
    if not model.accepts_image_features or not ("pixel_values" in chunk or keys):
        return chunk
    features = None if cache is None else cache.load(keys, chunk["input_ids"].device)
    if features is None:
        if "pixel_values" not in chunk:
            raise RuntimeError(
                f"`vision_cache` has lost features of the images {sorted({key for key, _ in keys})}, which it had "
                "when the batch was made. Keep other programs from deleting its files, and start again."
            )
        with _in_eval_mode(model.vlm):
            features = for_language_model(model.image_features(**chunk))
        if cache is not None:
            features = cache.save(keys, features)
    chunk.pop("pixel_values", None)
    return {**chunk, "image_features": features}


def tower_key(model: UniGDForConditionalGeneration, processor: UniGDProcessor, dtype: torch.dtype) -> str:
    """Returns a 128-bit hash of everything but the image that its features depend on: weights, settings, precision."""
    digest = hashlib.blake2b(digest_size=16)
    config = model.config.vlm_config.to_dict()
    for name in ("text_config", "_name_or_path", "transformers_version"):
        config.pop(name, None)
    image_processor = processor.image_processor
    # Pillow's and torchvision's processors have the same settings, and resize differently.
    for part in (
        json.dumps(config, sort_keys=True),
        type(image_processor).__name__,
        image_processor.to_json_string(),
        str(dtype),
    ):
        digest.update(part.encode())
    for parameter in vision_parameters(model):
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def open_vision_cache(
    folder: str,
    dtype: str | None,
    model: UniGDForConditionalGeneration,
    collator: UniGDDataCollator,
    mixed_precision: str,
) -> VisionFeatureCache:
    """
    Opens the stored features of a model's vision tower. The collator leaves out the pixels of images that are stored
    from then on.

    Args:
        folder: Folder of all towers.
        dtype: Name of the type that features are stored in, if not their own.
        model: The model.
        collator: Makes the batches.
        mixed_precision: What the tower runs in, by accelerate's name.
    """
    processor = collator.processor
    computed: Any = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, model.dtype)
    stored = None if dtype is None else getattr(torch, dtype)
    cache = VisionFeatureCache(folder, tower_key(model, processor, computed), stored)
    if model.accepts_image_features:
        collator.stored_images = StoredImages.for_processor(cache.index, processor)
    return cache


@contextmanager
def _in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """In training mode, a frozen tower would still change: batch normalisation counts what passes, and dropout would
    make other features in every step."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
