"""`/v1/alignment` and `/v1/summary_tokens`: what the model makes of sequences, to look at."""

import base64
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anyio import to_thread
from fastapi import APIRouter
from PIL import Image

from ..data import Example, RowError, SentenceSplitter
from ..data.example import Slice
from ..data.slices import slices_of
from ..evaluation.alignment import align_slices, embed_slices
from ..evaluation.figures import draw_alignment
from ..evaluation.prompts.views import top_tokens
from ..modeling import SequenceError, UniGDForConditionalGeneration, UniGDProcessor
from .contents import as_part
from .errors import ApiError
from .requests import AlignmentRequest, Part, SummaryTokensRequest
from .service import Service


ModelPair = tuple[UniGDForConditionalGeneration, UniGDProcessor]

_SPLITTER = SentenceSplitter()


def explain_routes(service: Service, before: ModelPair | None) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/alignment")
    async def alignment(request: AlignmentRequest) -> dict[str, Any]:
        service.check_model(request.model)

        async def read(content: list[Part], param: str) -> Example:
            (sequence,) = await service.reader.sequences([content], param)
            await service.check(sequence, param)
            return _example(sequence, param)

        a, b = await read(request.a, "a"), await read(request.b, "b")
        return await to_thread.run_sync(_align, service, a, b, request.figure)

    @router.post("/v1/summary_tokens")
    async def summary_tokens(request: SummaryTokensRequest) -> dict[str, Any]:
        service.check_model(request.model)
        service.instruction(request.prompt_name)  # which is refused if there is none
        (sequence,) = await service.reader.sequences([request.input], "input")
        await service.check(sequence, "input")

        def tokens() -> dict[str, Any]:
            with service.engine.alone() as now:
                return {
                    "data": _summary_tokens(now, sequence, request),
                    "before": None if before is None else _summary_tokens(before, sequence, request),
                }

        return {"object": "list", **await to_thread.run_sync(tokens), "model": service.name}

    return router


def _example(sequence: list[Any], param: str) -> Example:
    """A sequence with its slices, as `hf-unigd explain` makes it of a user's turn."""
    messages = [{"role": "user", "content": [as_part(part) for part in sequence]}]
    try:
        return Example(0, messages, slices=slices_of(messages, None, _SPLITTER), prompted=False)
    except ValueError as error:
        raise ApiError(400, f"`{param}` {error}", param) from error


def _align(service: Service, a: Example, b: Example, figure: bool) -> dict[str, Any]:
    try:
        with service.engine.alone() as (model, processor):
            x, y = (embed_slices(model, processor, example, _SPLITTER) for example in (a, b))
    except RowError as error:
        raise ApiError(400, f"A sequence {error.reason}") from error
    posterior, similarity = align_slices(x.float(), y.float())
    contents = [[each.content for each in example.slices] for example in (a, b)]
    return {
        "object": "alignment",
        "model": service.name,
        "similarity": similarity,
        "a": [_shown(each) for each in a.slices],
        "b": [_shown(each) for each in b.slices],
        "posterior": posterior.tolist(),
        "figure": _draw(contents[0], contents[1], posterior) if figure else None,
    }


def _shown(one: Slice) -> dict[str, Any]:
    is_text = isinstance(one.content, str)
    return {"type": "text", "text": one.content} if is_text else {"type": "image_url", "image_url": None}


def _draw(a: list[Image.Image | str], b: list[Image.Image | str], posterior: torch.Tensor) -> str:
    """The heat map, as a data URL."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "alignment.png")
        try:
            draw_alignment(a, b, posterior, file)
        except ImportError as error:
            raise ApiError(400, f"`figure`: {error}", "figure") from error
        return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


@torch.inference_mode()
def _summary_tokens(pair: ModelPair, sequence: list[Any], request: SummaryTokensRequest) -> list[dict[str, Any]]:
    """The likeliest tokens where a model reads the embedding, at its own prompt."""
    model, processor = pair
    instruction = request.instruction or processor.instructions.get(request.prompt_name)
    try:
        inputs = processor.process_sequences([sequence], prompted=True, instruction=[instruction])
    except SequenceError as error:
        raise ApiError(400, f"`input` {error.reason}", "input") from error
    _, logits = model.embed_and_predict(**inputs.to(model.device, model.dtype))
    found = top_tokens(processor, logits[0].float().softmax(-1).cpu(), min(request.k, logits.shape[1]))
    return [{"token": token, "probability": probability} for token, probability in found]
