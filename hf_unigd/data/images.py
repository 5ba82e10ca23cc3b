"""Opening pictures in every form in which a row may hold them."""

from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError


def open_image(value: Any, folder: str | Path | None = None) -> Image.Image:
    """Decodes a picture completely, as RGB.

    Args:
        value: A PIL image, encoded bytes, a path, or the `{"bytes": ..., "path": ...}` of an undecoded
            `datasets.Image`.
        folder: Where relative paths start.

    Raises:
        ValueError: the file is missing, the data is no picture or is cut off, or `value` is something else.
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
        raise ValueError(f"has a {type(value).__name__} where an image (PIL, bytes or path) is needed")
    try:
        image = value if isinstance(value, Image.Image) else Image.open(value)
        return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"has a corrupt image: {error}") from error
