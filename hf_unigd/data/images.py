"""Opens images in every form in which a row may hold them."""

from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError


def open_image(value: Any, folder: str | Path | None = None) -> Image.Image:
    """Decodes an image completely and converts it to RGB.

    Args:
        value: A PIL image, encoded bytes, a path, or the `{"bytes": ..., "path": ...}` of an undecoded
            `datasets.Image`.
        folder: Folder that relative paths start from.

    Raises:
        ValueError: the file is missing, the data is not an image or is truncated, or `value` is of another type. The
            message continues "Row 3 ...".
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (str, Path)):
        value = Path(folder, value) if folder else Path(value)
        if not value.is_file():
            raise ValueError(f"has a missing image: there is no file {value}")
    elif isinstance(value, bytes):
        value = BytesIO(value)
    elif not isinstance(value, Image.Image):
        raise ValueError(f"has an image of type {type(value).__name__}, but a PIL image, bytes or a path is needed")
    try:
        image = value if isinstance(value, Image.Image) else Image.open(value)
        return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"has a corrupt image: {error}") from error
