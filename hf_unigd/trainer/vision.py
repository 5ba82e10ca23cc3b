"""The vision tower: its parameters, and its features, which are computed once if it is frozen."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from ..modeling import UniGDForConditionalGeneration, UniGDProcessor


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
    model: UniGDForConditionalGeneration, chunk: Chunk, cache: "VisionFeatureCache | None" = None
) -> Chunk:
    """
    Returns the chunk with `image_features` in place of `pixel_values`. The chunk of a backbone that takes no features
    is returned as it is, and its tower runs in every forward pass.

    Args:
        model: The model, whose vision tower is frozen.
        chunk: Model inputs. With a `cache`, they include the `image_keys` of their images.
        cache: Features of earlier epochs and runs, if they are kept.
    """
    chunk = dict(chunk)
    keys = chunk.pop("image_keys", None)
    if "pixel_values" not in chunk or not model.accepts_image_features:
        return chunk
    features = None if cache is None else cache.load(keys, chunk["input_ids"].device)
    if features is None:
        features = model.image_features(**chunk)
        if cache is not None:
            cache.save(keys, features)
    del chunk["pixel_values"]
    return {**chunk, "image_features": features}


def image_key(image: Image.Image) -> str:
    """Returns a 128-bit hash of the mode, size and pixels of an image."""
    digest = hashlib.blake2b(f"{image.mode}{image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def tower_key(model: UniGDForConditionalGeneration, processor: UniGDProcessor, dtype: torch.dtype) -> str:
    """Returns a 128-bit hash of everything but the image that its features depend on: weights, settings, precision."""
    digest = hashlib.blake2b(digest_size=16)
    config = model.config.vlm_config.to_dict()
    for name in ("text_config", "_name_or_path", "transformers_version"):
        config.pop(name, None)
    for part in (json.dumps(config, sort_keys=True), processor.image_processor.to_json_string(), str(dtype)):
        digest.update(part.encode())
    for parameter in vision_parameters(model):
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class VisionFeatureCache:
    """Image features on disk, in one folder per vision tower and one file per image.

    Args:
        folder: Folder of all towers.
        tower: The result of [`tower_key`].
    """

    def __init__(self, folder: str | Path, tower: str):
        self.folder = Path(folder, tower)
        self.folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def for_model(
        cls, folder: str | Path, model: UniGDForConditionalGeneration, processor: UniGDProcessor, mixed_precision: str
    ) -> "VisionFeatureCache":
        """Opens the features of a model's vision tower, which runs in `mixed_precision` (accelerate's name of it)."""
        dtype: Any = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, model.dtype)
        return cls(folder, tower_key(model, processor, dtype))

    def load(self, keys: list[str], device: torch.device) -> ModelOutput | None:
        """Returns the features of the images, or `None` if those of any image are missing."""
        try:
            features = [load_file(self._file(key))["features"].to(device) for key in keys]
            return BaseModelOutputWithPooling(pooler_output=features)
        except (FileNotFoundError, SafetensorError):  # not written, or incomplete
            return None

    def save(self, keys: list[str], features: ModelOutput) -> None:
        """
        Writes the features of the images.

        Raises:
            ValueError: the tower's output is not a list with one tensor per image.
        """
        pooled = features.pooler_output
        extra = features.keys() - {"last_hidden_state", "pooler_output", "hidden_states", "attentions"}
        if not isinstance(pooled, (list, tuple)) or len(pooled) != len(keys) or extra:
            raise ValueError(
                "`vision_cache` cannot store what the vision tower of this backbone returns "
                f"({type(features).__name__} for {len(keys)} images). Leave it out: a frozen tower still runs once "
                "per step."
            )
        for key, feature in zip(keys, pooled, strict=True):
            file = self._file(key)
            file.parent.mkdir(exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}")  # processes may write the same image at once
            save_file({"features": feature.cpu().contiguous()}, unfinished)
            unfinished.replace(file)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"
