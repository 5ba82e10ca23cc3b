"""`/v1/search` and `/v1/answer`, from an index."""

import base64
import threading
import uuid
from io import BytesIO
from typing import Any

import torch
from anyio import to_thread
from fastapi import APIRouter
from PIL import Image

from ..retrieval import EmbeddingIndex, Hit
from ..retrieval.answering import make_prompts
from .errors import ApiError
from .requests import AnswerRequest, Retrieval, SearchRequest
from .route_chat import usage_of
from .service import Service


def retrieval_routes(service: Service, index: EmbeddingIndex) -> APIRouter:
    router = APIRouter()
    finder = _Finder(service, index)

    @router.post("/v1/search")
    async def search(request: SearchRequest) -> dict[str, Any]:
        service.check_model(request.model)
        (query,) = await service.reader.sequences([request.query], "query")
        hits = await finder.find(query, "query", request, request.offset, request.hybrid)
        data = await to_thread.run_sync(_entries, hits, request.include_images)
        return {"object": "list", "data": data, "model": service.name}

    @router.post("/v1/answer")
    async def answer(request: AnswerRequest) -> dict[str, Any]:
        service.check_model(request.model)
        if request.use_images and not index.description.store_images:
            raise ApiError(400, "`use_images`, but the index was made without pictures.", "use_images")
        (question,) = await service.reader.sequences([request.question], "question")
        hits = await finder.find(question, "question", request)
        ((prompt, used),) = await to_thread.run_sync(
            make_prompts, service.engine.preparer.processor, [question], [hits], request.use_images
        )
        generated = await service.generate_whole(prompt, "question", request)
        return {
            "id": f"answer-{uuid.uuid4().hex}",
            "object": "answer",
            "model": service.name,
            "text": generated.text.strip(),
            "finish_reason": generated.finish_reason,
            "entries": await to_thread.run_sync(_entries, used, request.include_images),
            "usage": usage_of(generated),
        }

    return router


class _Finder:
    """An index, which one thread at a time may use."""

    def __init__(self, service: Service, index: EmbeddingIndex):
        self.service = service
        self.index = index
        self._in_use = threading.Lock()

    async def find(
        self, sequence: list[Any], param: str, request: Retrieval, offset: int = 0, hybrid: bool = False
    ) -> list[Hit]:
        instruction = request.instruction or self.service.instruction("query")
        size = self.index.description.truncate_dim
        (embedded,) = await self.service.embed([sequence], param, instruction, size)
        texts = [" ".join(part for part in sequence if isinstance(part, str))] if hybrid else None

        def search() -> list[Hit]:
            with self._in_use, torch.inference_mode():
                (hits,) = self.index.nearest(
                    embedded.vector[None], request.k, where=request.where, offset=offset, texts=texts
                )
                return hits

        try:
            return await to_thread.run_sync(search)
        except ValueError as error:
            raise ApiError(400, str(error), "where") from error


def _entries(hits: list[Hit], include_images: bool) -> list[dict[str, Any]]:
    return [
        {
            "object": "entry",
            "id": hit.id,
            "row": hit.row,
            "score": hit.score,
            "content": [_part(part, include_images) for part in hit.sequence_parts],
            "answer": [_part(part, include_images) for part in hit.answer_parts],
            "metadata": dict(hit.metadata),
        }
        for hit in hits
    ]


def _part(part: str | bytes, include_images: bool) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not include_images:
        return {"type": "image_url", "image_url": None}
    kind = Image.open(BytesIO(part)).get_format_mimetype() or "application/octet-stream"
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(part).decode()}"}}
