"""The app that answers requests."""

import time
from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from ..retrieval import EmbeddingIndex
from ..version import __version__
from .engine import Engine
from .errors import add_error_handlers
from .guard import Guard
from .route_chat import chat_routes
from .route_embeddings import embedding_routes
from .route_explain import ModelPair, explain_routes
from .route_retrieval import retrieval_routes
from .service import Service


def create_app(
    engine: Engine,
    name: str,
    index: EmbeddingIndex | None = None,
    api_key: str | None = None,
    page: bool = False,
    before: ModelPair | None = None,
    allowed_hosts: Collection[str] = (),
) -> FastAPI:
    """
    The app of a model that has been started.

    Args:
        engine: Runs the model.
        name: The name that clients call it.
        index: What `/v1/search` and `/v1/answer` look into. They are there with an index alone.
        api_key: The key that all paths but `/health` ask for.
        page: Whether the page is at `/`.
        before: A model and its processor, used by nobody else, whose summary tokens are shown beside those of the
            engine's: what it was trained from.
        allowed_hosts: Names, beside this machine's, that requests may give their host where there is no key.

    Raises:
        ImportError: there is to be a page, and gradio is not installed.
    """
    service, created = Service(engine, name), int(time.time())
    # The pages of the documentation would load scripts from elsewhere.
    app = FastAPI(title="hf-unigd", version=__version__, docs_url=None, redoc_url=None)
    add_error_handlers(app)
    hosts = {host.lower() for host in allowed_hosts}
    app.add_middleware(Guard, limits=engine.limits, metrics=engine.metrics, api_key=api_key, allowed_hosts=hosts)
    app.include_router(embedding_routes(service))
    app.include_router(chat_routes(service))
    app.include_router(explain_routes(service, before))
    if index is not None:
        app.include_router(retrieval_routes(service, index))

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": created, "owned_by": "hf-unigd"}
        return {"object": "list", "data": [model]}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(engine.metrics.text(), media_type="text/plain; version=0.0.4")

    if page:
        from .page.layout import add_page

        app.state.end_of_pages = add_page(app, name, engine.limits, index is not None, api_key)
    return app
