"""The vision tower: its parameters, and its features, which are computed once if it is frozen."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import ModelOutput

from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..outputs import writing


Chunk = dict[str, Any]
ImageKey = tuple[str, int]  # the result of `image_key`, and the number of tokens that the image became


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
        with _in_eval_mode(model.vlm):
            features = _for_language_model(model.image_features(**chunk))
        if cache is not None:
            cache.save(keys, features)
    del chunk["pixel_values"]
    return {**chunk, "image_features": features}


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

    def load(self, keys: list[ImageKey], device: torch.device) -> ModelOutput | None:
        """Returns the features of the images, or `None` if those of any image are missing."""
        try:
            images = [load_file(self._file(key), device=str(device)) for key in keys]
        except (FileNotFoundError, SafetensorError):  # not written, or incomplete
            return None
        return join_images(images)

    def save(self, keys: list[ImageKey], features: ModelOutput) -> None:
        """
        Writes the features of the images.

        Raises:
            ValueError: the tower's output cannot be divided into images.
        """
        for key, tensors in zip(keys, split_images(features, [length for _, length in keys]), strict=True):
            file = self._file(key)
            file.parent.mkdir(exist_ok=True)
            with writing(file) as unfinished:
                save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished)

    def _file(self, key: ImageKey) -> Path:
        name, length = key
        return self.folder / name[:2] / f"{name}-{length}.safetensors"


_LISTED, _SHARED = "listed", "shared"


def _for_language_model(features: ModelOutput) -> ModelOutput:
    """The output of a vision tower without the states of the tower's own layers, which would fill the memory while the
    chunks of a step wait."""
    kept = ModelOutput()
    for name in features.keys() - {"last_hidden_state", "hidden_states", "attentions"}:
        kept[name] = features[name]
    return kept


def split_images(features: ModelOutput, lengths: list[int]) -> list[dict[str, torch.Tensor]]:
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
    images: list[dict[str, torch.Tensor]] = [{} for _ in lengths]
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


def join_images(images: list[dict[str, torch.Tensor]]) -> ModelOutput:
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
