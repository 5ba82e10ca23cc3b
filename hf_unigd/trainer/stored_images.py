"""Processes sequences whose image features are stored, without the work on the pixels of their images.

A processor replaces an image by its tokens, and returns its size or its tiles beside its pixels. For most families,
all of this depends on the size of the image alone. What their image processor makes of an image of each size is kept,
except its pixels, and put together for any images of these sizes.
"""

import copy
import logging
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_utils import make_flat_list_of_images

from ..modeling import UniGDProcessor
from .feature_shards import ShardIndex


logger = logging.getLogger(__name__)

PIXELS = "pixel_values"
# Width and height of the images that the comparison with the backbone's own image processor is made with.
_SIZES = (336, 336), (64, 48), (48, 64), (640, 200), (200, 900)


class StoredImages:
    """
    Args:
        index: The images that are stored.
        processor: A processor for which [`without_pixels`] makes one.
    """

    def __init__(self, index: ShardIndex, processor: UniGDProcessor):
        self.index = index
        self.processor = processor

    @classmethod
    def for_processor(cls, index: ShardIndex, processor: UniGDProcessor) -> "StoredImages | None":
        """Returns `None`, with a message in the log, if what the processor makes of an image does not depend on its
        size alone."""
        sizes_alone = without_pixels(processor)
        if sizes_alone is not None:
            return cls(index, sizes_alone)
        logger.warning(
            "Images are resized and normalised even if `vision_cache` holds their features, because what %s makes of "
            "an image does not depend on its size alone.",
            type(processor.vlm_processor).__name__,
        )
        return None

    def process(self, keys: list[str], *args, **kwargs) -> BatchFeature | None:
        """
        Args:
            keys: The keys of all images of the sequences, in order.
            args, kwargs: Arguments of [`UniGDProcessor.process_sequences`].

        Returns:
            What it returns, without `pixel_values`, or `None` if there are no images or some are not stored.
        """
        if not keys or not all(map(self.index.knows, keys)):
            return None
        inputs = self.processor.process_sequences(*args, **kwargs)
        lengths = inputs["image_lengths"].tolist()  # an image may become fewer tokens beside others
        if any(self.index.find(key) is None for key in zip(keys, lengths, strict=True)):
            return None
        inputs.pop(PIXELS)
        return inputs


def without_pixels(processor: UniGDProcessor) -> UniGDProcessor | None:
    """
    Returns a processor that makes the same inputs but `pixel_values`, which hold no values. It is compared with
    `processor` on images of several sizes, alone and beside each other.

    Returns:
        `None` if they make other inputs.
    """
    vlm_processor = copy.copy(processor.vlm_processor)
    vlm_processor.image_processor = _SizesAlone(vlm_processor.image_processor)
    sizes_alone = UniGDProcessor(vlm_processor, **processor._settings)
    images = [Image.new("RGB", size) for size in _SIZES]
    sequences = [[image, "a"] for image in images] + [["a", images[0], "b", images[3]], "a", images[1:3], images[::-1]]
    try:
        expected, made = (each.process_sequences(sequences, image_lengths=True) for each in (processor, sizes_alone))
    except Exception:  # of shapes that cannot be put together, or of an image processor that wants pixels
        logger.debug("Cannot process images by their sizes.", exc_info=True)
        return None
    same = expected.keys() == made.keys() and all(
        name == PIXELS or _equal(value, made[name]) for name, value in expected.items()
    )
    return sizes_alone if same else None


class _SizesAlone:
    """Takes the place of a backbone's image processor."""

    def __init__(self, image_processor: Any):
        self._image_processor = image_processor

    def __getattr__(self, name: str) -> Any:
        if name == "_image_processor":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self._image_processor, name)

    def __call__(self, images: Any, **kwargs) -> BatchFeature:
        outputs = [self._outputs(image.size, **kwargs) for image in make_flat_list_of_images(images)]
        return BatchFeature({name: _joined(name, [each[name] for each in outputs]) for name in outputs[0]})

    @lru_cache(maxsize=4096)  # noqa: B019  # it lives as long as the process
    def _outputs(self, size: tuple[int, int], **kwargs) -> dict[str, Any]:
        outputs = self._image_processor([[Image.new("RGB", size)]], **kwargs)
        return {name: _empty(value.shape) if name == PIXELS else value for name, value in outputs.items()}


def _empty(shape) -> torch.Tensor:
    """A tensor that takes no memory."""
    return torch.zeros(()).expand(shape)


def _joined(name: str, values: list) -> Any:
    if name == PIXELS:  # padded to the most tiles, if they are counted in another dimension than the first
        first, *others = zip(*(value.shape for value in values), strict=True)
        return _empty((sum(first), *map(max, others)))
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return [item for value in values for item in value]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a == b
