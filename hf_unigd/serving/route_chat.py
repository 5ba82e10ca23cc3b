"""`/v1/chat/completions`."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from .errors import as_api_error
from .generating import Generated
from .requests import ChatRequest
from .service import Service


def chat_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(request: ChatRequest) -> dict[str, Any] | StreamingResponse:
        service.check_model(request.model)
        messages = await service.reader.chat(request.messages)
        if not request.stream:
            generated = await service.generate_whole(messages, "messages", request)
            message = {"role": "assistant", "content": generated.text, "refusal": None}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": generated.finish_reason}
            return {**_head("chat.completion", service.name), "choices": [choice], "usage": usage_of(generated)}
        pieces = service.generate(messages, "messages", request)
        first = await anext(pieces)  # so that what is refused is refused by its status
        with_usage = request.stream_options is not None and request.stream_options.include_usage
        events = _events(first, pieces, _head("chat.completion.chunk", service.name), with_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    return router


def usage_of(generated: Generated) -> dict[str, int]:
    prompt, completion = generated.prompt_tokens, generated.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _events(
    first: str | Generated, pieces: AsyncIterator[str | Generated], head: dict[str, Any], with_usage: bool
) -> AsyncIterator[str]:
    """The chunks of an answer as server-sent events."""

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event({**head, "choices": [choice], **({"usage": None} if with_usage else {})})

    async def all_pieces() -> AsyncIterator[str | Generated]:
        yield first
        async for piece in pieces:
            yield piece

    yield chunk({"role": "assistant", "content": ""})
    try:
        async for piece in all_pieces():
            if isinstance(piece, str):
                yield chunk({"content": piece})
                continue
            yield chunk({}, piece.finish_reason)
            if with_usage:
                yield _event({**head, "choices": [], "usage": usage_of(piece)})
    except Exception as error:
        yield _event(as_api_error(error).body)
        return
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
