"""The vision tower: which parameters it has, and its features computed once where it is frozen."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..modeling import UniGDForConditionalGeneration, UniGDProcessor


Chunk = dict[str, Any]


def vision_parameters(model: UniGDForConditionalGeneration) -> list[torch.nn.Parameter]:
    """Parameters of the backbone outside its language model: the vision tower and its projector."""
    language = {id(parameter) for parameter in model.vlm.get_decoder().parameters()}
    language |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    return [parameter for parameter in model.vlm.parameters() if id(parameter) not in language]


def is_frozen(model: UniGDForConditionalGeneration) -> bool:
    """Whether no part of the vision tower and its projector is trained."""
    return not any(parameter.requires_grad for parameter in vision_parameters(model))


@torch.no_grad()
def with_image_features(
    model: UniGDForConditionalGeneration, chunk: Chunk, cache: "VisionFeatureCache | None" = None
) -> Chunk:
    """
    The same chunk with `image_features` in place of its pictures' pixels.

    Args:
        model: The model, its vision tower frozen.
        chunk: Model inputs, and the `image_keys` of their pictures where there is a `cache`.
        cache: Features of former epochs and runs.
    """
    chunk = dict(chunk)
    keys = chunk.pop("image_keys", None)
    if "pixel_values" not in chunk:
        return chunk
    features = None if cache is None else cache.load(keys)
    if features is None:
        features = model.image_features(**chunk)
        if cache is not None:
            cache.save(keys, features)
    del chunk["pixel_values"]
    device = chunk["input_ids"].device
    return {**chunk, "image_features": tuple(feature.to(device) for feature in features)}


def image_key(image: Image.Image) -> str:
    """A 128-bit hash of a picture's size and pixels."""
    digest = hashlib.blake2b(f"{image.mode}{image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def tower_key(model: UniGDForConditionalGeneration, processor: UniGDProcessor, dtype: torch.dtype) -> str:
    """A 128-bit hash of all that a picture's features depend on but the picture: weights, settings, precision."""
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
    """Features of pictures on disk, a file each, in a folder of the tower that they are of.

    Args:
        folder: Holds a folder a tower.
        tower: What [`tower_key`] says.
    """

    def __init__(self, folder: str | Path, tower: str):
        self.folder = Path(folder, tower)
        self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, keys: list[str]) -> tuple[torch.Tensor, ...] | None:
        """Features of these pictures, where all of them are there."""
        try:
            return tuple(load_file(self._file(key))["features"] for key in keys)
        except (FileNotFoundError, SafetensorError):  # never written, or cut off
            return None

    def save(self, keys: list[str], features: tuple[torch.Tensor, ...]) -> None:
        for key, feature in zip(keys, features, strict=True):
            file = self._file(key)
            file.parent.mkdir(exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}")  # processes may write the same picture at once
            save_file({"features": feature.cpu().contiguous()}, unfinished)
            unfinished.replace(file)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"
