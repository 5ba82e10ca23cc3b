"""The features of a frozen vision tower, kept on disk for later epochs and runs."""

import logging
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers.utils import ModelOutput

from ..bulk.image_features import ImageFeatures, join_images, split_images
from .feature_shards import ImageKey, ShardIndex, ShardWriter, read_images


logger = logging.getLogger(__name__)


class VisionFeatureCache:
    """
    Image features on disk, in one folder per vision tower and type.

    Args:
        folder: Folder of all towers.
        tower: The result of [`~hf_unigd.trainer.vision.tower_key`].
        dtype: Type that features are stored in, if not their own. What is computed is rounded to it at once, so that
            the first epoch learns from the same features as the others.

    Attributes:
        index: What the folder holds.
    """

    def __init__(self, folder: str | Path, tower: str, dtype: torch.dtype | None = None):
        name = tower if dtype is None else f"{tower}-{str(dtype).removeprefix('torch.')}"
        self.index = ShardIndex(Path(folder, name))
        self.index.refresh()
        self.dtype = dtype
        self._expected_images: int | None = None
        self._writer = ShardWriter(self.index, dtype)
        self._is_checked = False

    def expect_images(self, batch: dict[str, Any], dataset: Any) -> None:
        """
        Estimates how many images will be stored, if a dataset has as many a row as the first batch with images.
        Before the first image is stored, the space that they will take is compared with what is free.

        Args:
            batch: A batch of [`UniGDDataCollator`].
            dataset: The examples that it is a part of. Those of a stream are not counted.
        """
        if self._expected_images is None and hasattr(dataset, "__len__"):
            images = {key for chunk in batch["chunks"] for key, _ in chunk.get("image_keys", [])}
            if images:
                self._expected_images = len(images) * len(dataset) // len(batch["rows"])

    def load(self, keys: list[ImageKey], device: torch.device) -> ModelOutput | None:
        """Returns the features of the images, or `None` if those of any image are missing."""
        images = {key: self._writer.find(key) for key in keys}
        shards: dict[Path, list[ImageKey]] = defaultdict(list)
        for key in (key for key, image in images.items() if image is None):
            file = self.index.find(key)
            if file is None:
                return None
            shards[file].append(key)
        try:
            for file, inside in shards.items():
                images |= zip(inside, read_images(file, inside, device), strict=True)
        except (FileNotFoundError, KeyError, SafetensorError) as error:
            logger.warning("Cannot read %s: %s.", file, error)
            return None
        return join_images([_on(device, images[key]) for key in keys])

    def save(self, keys: list[ImageKey], features: ModelOutput) -> ModelOutput:
        """
        Stores the features of the images that are not stored yet.

        Returns:
            The features as they will be read.

        Raises:
            ValueError: the tower's output cannot be divided into images.
            OSError: the disk is full, or would not hold the features of all images.
        """
        images = dict(zip(keys, split_images(features, [length for _, length in keys]), strict=True))
        self._check_space(next(iter(images.values())))
        for key, image in images.items():
            if self._writer.find(key) is None and self.index.find(key) is None:
                self._writer.add(key, image)
        if self.dtype is None:
            return features
        rounded = ({part: self._rounded(tensor) for part, tensor in images[key].items()} for key in keys)
        return join_images(list(rounded))

    def flush(self) -> None:
        """
        Writes what is not written yet.

        Raises:
            OSError: the disk is full.
        """
        self._writer.flush()

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype).to(tensor.dtype) if tensor.is_floating_point() else tensor

    def _check_space(self, image: ImageFeatures) -> None:
        """Compares the space that all images will take, if each is like this one, with what is free."""
        if self._is_checked:
            return
        self._is_checked = True
        folder = self.index.folder
        size = sum(
            tensor.numel() * (self.dtype if self.dtype and tensor.is_floating_point() else tensor.dtype).itemsize
            for tensor in image.values()
        )
        free = shutil.disk_usage(folder).free
        message = f"`vision_cache` takes {size / 1e6:.2g} MB an image"
        if self._expected_images is None:
            message += f". How many images there are is not known; {folder} has {free / 1e9:,.1f} GB free."
        else:
            missing = max(0, self._expected_images - len(self.index))
            message += (
                f", {missing * size / 1e9:,.1f} GB for about {missing:,} images. {folder} has {free / 1e9:,.1f} GB "
                "free."
            )
            if missing * size > free:
                raise OSError(
                    f"{message} Name a folder on a larger disk, set `vision_cache_dtype`, or leave `vision_cache` "
                    "out: a frozen tower still runs once per step."
                )
        if PartialState().is_local_main_process:
            logger.warning(message)


def _on(device: torch.device, image: ImageFeatures | None) -> ImageFeatures:
    return {part: tensor.to(device) for part, tensor in (image or {}).items()}
