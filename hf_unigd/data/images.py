"""Opens images in every form in which a row may hold them."""

from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from ..modeling.images_unigd import MAX_PIXELS, ImageError, read_size
from ..modeling.images_unigd import open_image as open_source


# Of files on the Hub, and inside archives on the Hub or on disk. Other addresses in a row are not fetched.
_PROTOCOLS = {"hf", "zip", "tar", "file"}


def open_image(value: Any, folder: str | Path | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image of a row by [`~hf_unigd.modeling.images_unigd.open_image`].

    Args:
        value: A PIL image, encoded bytes, a path, or the `{"bytes": ..., "path": ...}` of an undecoded
            `datasets.Image`.
        folder: Folder that paths start from and must not leave.
        max_pixels: The largest width times height.

    Raises:
        ValueError: the file is missing or outside `folder`, the data is not an image, is too large or is corrupt, or
            `value` is of another type. The message continues "Row 3 ...".
    """
    return open_source(_source(value, folder), max_pixels)


def blank_image(value: Any, folder: str | Path | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns a black image of the size of that which [`open_image`] opens. Only the header is read.

    Args:
        value, folder, max_pixels: As in [`open_image`].

    Raises:
        ValueError: as [`open_image`] does, but for an image whose data is corrupt behind its header.
    """
    return _blank(read_size(_source(value, folder), max_pixels))


def encoded_image(value: Any, folder: str | Path | None = None, max_pixels: int = MAX_PIXELS) -> bytes:
    """Returns the encoded bytes of an image as they are in the source, or PNG of a PIL image. Only the header is read.

    Args:
        value, folder, max_pixels: As in [`open_image`].

    Raises:
        ValueError: as [`open_image`] does, but for an image whose data is corrupt behind its header.
    """
    source = _source(value, folder)
    if isinstance(source, Image.Image):
        file = BytesIO()
        # At Pillow's own level, compressing would take longer than embedding.
        open_source(source, max_pixels).save(file, "PNG", compress_level=1)
        return file.getvalue()
    encoded = source.read_bytes() if isinstance(source, Path) else source.getvalue()
    read_size(BytesIO(encoded), max_pixels)
    return encoded


@lru_cache(maxsize=64)
def _blank(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size)


def _source(value: Any, folder: str | Path | None) -> Any:
    """What Pillow opens."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and "://" in value and folder is None:
        value = _read_url(value)
    if isinstance(value, (str, Path)):
        return _existing_file(value, folder)
    if isinstance(value, bytes):
        return BytesIO(value)
    if not isinstance(value, Image.Image):
        raise ValueError(f"has an image of type {type(value).__name__}, but a PIL image, bytes or a path is needed")
    return value


def _existing_file(path: str | Path, folder: str | Path | None) -> Path:
    file = Path(folder, path) if folder else Path(path)
    try:
        if folder and not file.resolve().is_relative_to(Path(folder).resolve()):
            raise ImageError(
                f"has an image outside `image_folder`: {path}. Move it into the folder, or leave `image_folder` out "
                "and give whole paths"
            )
        is_file = file.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, or that holds a null character
        raise ImageError(f"has an image whose path cannot be used: {error}") from error
    if not is_file:
        raise ImageError(f"has a missing image: there is no file {file}")
    return file


def _read_url(url: str) -> bytes:
    """Reads a file of the Hub or inside an archive, as `datasets` names those of a stream."""
    protocols = {link.partition("://")[0] for link in url.split("::") if "://" in link}
    if not protocols <= _PROTOCOLS:
        raise ImageError(f"has an image at {url}, which is not fetched. Download it, and give its path")
    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except Exception as error:  # of the Hub, the network, or the archive
        raise ImageError(f"has an image that cannot be read: {error}") from error
