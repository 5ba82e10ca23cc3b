"""Reads the contents of a request: its texts, and the images that it holds or names."""

import base64
import binascii
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from anyio import CapacityLimiter, to_thread
from PIL import Image

from ..data.images import open_image
from ..modeling.images_unigd import ImageError, read_size
from .errors import ApiError
from .limits import Limits
from .remote_images import fetch
from .requests import ImagePart, TextPart, Turn


# How many images are decoded at the same time.
_DECODERS = 4


class ContentReader:
    """
    Args:
        limits: Of a request.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._decoders: CapacityLimiter | None = None  # belongs to the loop that it is made in

    async def sequences(self, contents: Sequence[Sequence[TextPart | ImagePart]], param: str) -> list[list[Any]]:
        """
        Contents as [`UniGDProcessor.process_sequences`] takes them.

        Args:
            contents: All those of a request.
            param: How the request calls them.

        Raises:
            ApiError: an image cannot be used, or there are too many contents or images.
        """
        if len(contents) > self.limits.max_inputs:
            raise ApiError(
                400,
                f"`{param}` has {len(contents)} inputs, more than the {self.limits.max_inputs} of a request "
                "(`--max_inputs`). Send several requests.",
                param,
            )
        images = [part for content in contents for part in content if isinstance(part, ImagePart)]
        opened = iter(await self._images([part.image_url.url for part in images], param))
        return [
            [part.text if isinstance(part, TextPart) else next(opened) for part in content] for content in contents
        ]

    async def chat(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """
        Messages as [`UniGDProcessor.process_sequences`] takes them.

        Raises:
            ApiError: as [`sequences`] does.
        """
        contents = await self.sequences([turn.content for turn in turns], "messages")
        return [
            {"role": turn.template_role, "content": [as_part(part) for part in content]}
            for turn, content in zip(turns, contents, strict=True)
        ]

    async def _images(self, urls: list[str], param: str) -> list[Image.Image]:
        if len(urls) > self.limits.max_images:
            raise ApiError(
                400,
                f"`{param}` has {len(urls)} images, more than the {self.limits.max_images} of a request "
                "(`--max_images`).",
                param,
            )
        encoded = [await self._read(url, param) for url in urls]
        if not encoded:
            return []
        self._decoders = self._decoders or CapacityLimiter(_DECODERS)
        try:
            return await to_thread.run_sync(self._decode, encoded, limiter=self._decoders)
        except ImageError as error:
            raise ApiError(400, f"`{param}` {error}", param) from error

    def _decode(self, encoded: list[bytes]) -> list[Image.Image]:
        most = self.limits.max_image_pixels
        sizes = [read_size(BytesIO(each), most) for each in encoded]
        if (pixels := sum(width * height for width, height in sizes)) > most:
            raise ImageError(f"has images of {pixels} pixels, more than the {most} of a request. Resize them.")
        return [open_image(each, max_pixels=most) for each in encoded]

    async def _read(self, url: str, param: str) -> bytes:
        """The encoded image that an address holds or names."""
        if url.startswith("data:"):
            return _of_data_url(url, param)
        if not url.startswith(("http://", "https://")):
            raise ApiError(400, f"`{param}` has an image at {url[:80]!r}; send a data URL.", param)
        if not self.limits.allow_remote_images:
            raise ApiError(
                400,
                f"`{param}` has an image at {url[:80]!r}, and this server fetches none. Send a data URL, or start the "
                "server with `--allow_remote_images true`.",
                param,
            )
        return await fetch(url, self.limits.max_body, param)


def as_part(part: str | Image.Image) -> dict[str, Any]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}


def _of_data_url(url: str, param: str) -> bytes:
    kind, comma, data = url.partition(",")
    if not comma or not kind.endswith(";base64"):
        raise ApiError(400, f"`{param}` has a data URL that is not of the form data:image/png;base64,...", param)
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ApiError(400, f"`{param}` has a data URL whose base64 is broken: {error}.", param) from error
