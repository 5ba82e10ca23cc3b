"""How the page asks: as any other client, so that limits, counts and errors are those of the API."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp


class PageError(Exception):
    """What the page tells its reader."""


class PageClient:
    """
    Asks the app in the same process.

    Args:
        app: The app, with what stands before it.
        api_key: The key that it asks for.
    """

    def __init__(self, app: ASGIApp, api_key: str | None):
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app, raise_app_exceptions=False),
            base_url="http://127.0.0.1",
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=None,
        )

    async def post(self, path: str, **body: Any) -> dict[str, Any]:
        """
        The answer of a path.

        Raises:
            PageError: the request was refused. It says why.
        """
        answer = await self._client.post(path, json=body)
        if answer.is_error:
            raise PageError(answer.json()["error"]["message"])
        return answer.json()


def content_of(text: str, pictures: Sequence[str | Path]) -> list[dict[str, Any]]:
    """
    The parts of a request: pictures, then a text.

    Args:
        text: The text, which may be empty.
        pictures: Files, which nobody has looked into.

    Raises:
        PageError: there is neither.
    """
    parts: list[dict[str, Any]] = []
    for picture in pictures:
        data = base64.b64encode(Path(picture).read_bytes()).decode()
        # The server finds out by itself what is in it.
        parts.append({"type": "image_url", "image_url": {"url": f"data:application/octet-stream;base64,{data}"}})
    if text.strip():
        parts.append({"type": "text", "text": text.strip()})
    if not parts:
        raise PageError("Nothing to look for yet: type a text, add a picture, or both.")
    return parts
