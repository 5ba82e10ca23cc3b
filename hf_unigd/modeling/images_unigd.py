"""Opens images as people see them: upright, on white, with their values kept, and of a limited size."""

import warnings
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


MAX_PIXELS = 64_000_000  # which take 192 MB when they are decoded
_SWAPPED = (5, 6, 7, 8)  # the values of EXIF's orientation that swap width and height


class ImageError(ValueError):
    """An image cannot be used. The message continues "Row 3 ..."."""


def open_image(source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    Opens an image completely: upright by its EXIF tag, transparency on white, in RGB with 8 bits a channel. Values of
    more than 8 bits are scaled instead of cut off, so that a ramp stays a ramp.

    Args:
        source (`PIL.Image.Image`, `str`, `os.PathLike` or binary file): The image, or where it is read from.
        max_pixels (`int`, *optional*, defaults to 64 million): The largest width times height. It is checked before
            anything is decoded.

    Returns:
        `PIL.Image.Image` in mode RGB: the image itself if there is nothing to change.

    Raises:
        ImageError: the image is larger, is empty, or cannot be decoded.
    """
    with _image_errors(source):
        image, turned = _read_header(source, max_pixels)
        return _as_rgb(ImageOps.exif_transpose(image) if turned else image)


def read_size(source, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """
    Reads the header of an image, and decodes nothing.

    Args:
        source, max_pixels: As in [`open_image`].

    Returns:
        `tuple[int, int]`: Width and height of the image that [`open_image`] returns, in pixels.

    Raises:
        ImageError: the image is larger, is empty, or has a broken header.
    """
    with _image_errors(source):
        image, turned = _read_header(source, max_pixels)
        with image if image is not source else nullcontext():  # closes the file
            swapped = turned and image.getexif()[ExifTags.Base.Orientation] in _SWAPPED
            return image.size[::-1] if swapped else image.size


def _read_header(source, max_pixels: int) -> tuple[Image.Image, bool]:
    """The image before it is decoded, and whether it has to be turned."""
    image = source if isinstance(source, Image.Image) else Image.open(source)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"has an image of {width} x {height} pixels, more than {max_pixels}. Resize it, or raise "
            "`max_image_pixels`."
        )
    if not width * height:
        raise ImageError(f"has an empty image of {width} x {height} pixels.")
    return image, image.getexif().get(ExifTags.Base.Orientation, 1) != 1


@contextmanager
def _image_errors(source):
    """Turns whatever Pillow raises into an [`ImageError`]."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's own limit, and of what it repairs in broken metadata
            yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # it has a limit of its own, for the whole process
        raise ImageError(f"has an image that Pillow refuses: {error} Raise `PIL.Image.MAX_IMAGE_PIXELS`.") from error
    except FileNotFoundError as error:
        raise ImageError(f"has a missing image: there is no file {source}.") from error
    except UnidentifiedImageError as error:
        named = "" if hasattr(source, "read") else f" of {source}"
        raise ImageError(f"has a corrupt image: cannot identify the format{named}.") from error
    except Exception as error:  # Pillow's decoders raise errors of a dozen types for broken files
        raise ImageError(f"has a corrupt image: {error or type(error).__name__}.") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        image.load()
        # The image of a file closes it once it is read, but for one of several frames, which would keep it open.
        return image.copy() if getattr(image, "is_animated", False) else image
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _as_eight_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _as_eight_bits(image: Image.Image) -> Image.Image:
    """An image of one deep channel with values from 0 to 255. Integers are scaled by the smallest of the usual depths
    that holds them all, as files of 16 bits often hold 8 or 12; numbers from 0 to 1 by 255; and others by the range of
    the image, if they are not from 0 to 255 already."""
    values = np.asarray(image).astype(np.float64)
    largest = float(np.finfo(np.float32).max)
    values = np.nan_to_num(values, posinf=largest, neginf=-largest)
    low, high = values.min(), values.max()
    depth = next((bits for bits in (8, 10, 12, 14, 16) if high < 1 << bits), None)
    if image.mode == "F" and low >= 0 and high <= 1:
        values = values * 255
    elif image.mode != "F" and low >= 0 and depth is not None:
        values = values * (255 / ((1 << depth) - 1))
    elif low < 0 or high > 255:
        values = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    return Image.fromarray(np.round(values).astype(np.uint8))
