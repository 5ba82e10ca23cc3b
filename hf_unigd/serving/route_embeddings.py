"""`/v1/embeddings` and `/v1/rerank`."""

import base64
from typing import Any

from fastapi import APIRouter

from .embedding import Embedded
from .requests import EmbeddingRequest, RerankRequest
from .service import Service


def embedding_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(request: EmbeddingRequest) -> dict[str, Any]:
        service.check_model(request.model)
        instruction = request.instruction
        if request.prompt_name is not None:
            instruction = service.instruction(request.prompt_name)
        if request.messages is not None:
            sequences: list[Any] = [await service.reader.chat(request.messages)]
        else:
            assert request.input is not None
            sequences = await service.reader.sequences(request.input, "input")
        param = "input" if request.messages is None else "messages"
        embedded = await service.embed(sequences, param, instruction, request.dimensions)
        data = [
            {"object": "embedding", "index": place, "embedding": _encoded(each, request.encoding_format)}
            for place, each in enumerate(embedded)
        ]
        return {"object": "list", "data": data, "model": service.name, "usage": _usage(embedded)}

    @router.post("/v1/rerank")
    async def rerank(request: RerankRequest) -> dict[str, Any]:
        service.check_model(request.model)
        query, *documents = await service.reader.sequences([request.query, *request.documents], "documents")
        instruction = request.instruction or service.instruction("query")
        (asked,) = await service.embed([query], "query", instruction)
        found = await service.embed(documents, "documents", service.instruction("document"))
        scores = [float(asked.vector @ each.vector) for each in found]
        results = [
            {
                "index": place,
                "relevance_score": scores[place],
                **({"document": {"content": request.documents[place]}} if request.return_documents else {}),
            }
            for place in sorted(range(len(scores)), key=lambda place: -scores[place])
        ]
        return {
            "object": "list",
            "results": results[: request.top_n],
            "model": service.name,
            "usage": _usage([asked, *found]),
        }

    return router


def _encoded(embedded: Embedded, encoding_format: str) -> list[float] | str:
    if encoding_format == "float":
        return embedded.vector.tolist()
    return base64.b64encode(embedded.vector.numpy().astype("<f4").tobytes()).decode()


def _usage(embedded: list[Embedded]) -> dict[str, int]:
    tokens = sum(each.tokens for each in embedded)
    return {"prompt_tokens": tokens, "total_tokens": tokens}
