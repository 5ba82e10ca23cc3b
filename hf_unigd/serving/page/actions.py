"""What the page does when its reader asks for something: each action returns HTML."""

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, TypedDict

from anyio import to_thread

from . import fragments
from .client import PageClient, PageError, content_of


class Input(TypedDict):
    """What gradio's box of texts and files holds: a text, and the paths of files."""

    text: str
    files: list[str]


def _told(action: Callable[..., Awaitable[str]]) -> Callable[..., Awaitable[str]]:
    """An action that shows what is refused."""

    @wraps(action)
    async def shown(*args: Any) -> str:
        try:
            return await action(*args)
        except PageError as error:
            return fragments.problem(str(error))

    return shown


class Actions:
    """
    Args:
        client: Asks the server.
    """

    def __init__(self, client: PageClient):
        self._client = client

    @_told
    async def search(self, query: Input | None, k: int) -> str:
        """The entries nearest to a query."""
        content = await _content(query)
        found = await self._client.post("/v1/search", query=content, k=int(k), include_images=True)
        return await to_thread.run_sync(fragments.entries, found["data"])

    @_told
    async def ask(self, question: Input | None, k: int) -> str:
        """An answer to a question, and the entries used."""
        content = await _content(question)
        answer = await self._client.post("/v1/answer", question=content, k=int(k), include_images=True, temperature=0)
        return await to_thread.run_sync(fragments.answer, answer["text"], answer["entries"])

    @_told
    async def align(self, a: Input | None, b: Input | None) -> str:
        """How two sequences align."""
        found = await self._client.post("/v1/alignment", a=await _content(a), b=await _content(b), figure=True)
        return fragments.alignment(found["figure"], found["similarity"])

    @_told
    async def look(self, sequence: Input | None) -> str:
        """What the model would say at the summary token."""
        found = await self._client.post("/v1/summary_tokens", input=await _content(sequence))
        return fragments.tokens(found["data"], found["before"])


async def _content(value: Input | None) -> list[dict[str, Any]]:
    if value is None:
        return content_of("", [])
    return await to_thread.run_sync(content_of, value["text"] or "", value["files"] or [])
