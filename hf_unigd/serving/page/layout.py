"""The page's boxes and buttons, and how it is put into the app."""

import asyncio
from pathlib import Path
from typing import cast

import gradio as gr
from fastapi import FastAPI
from gradio.routes import App
from gradio.utils import get_upload_folder
from starlette.routing import Mount

from ..limits import Limits
from . import fragments
from .actions import Actions
from .client import PageClient


_WITHOUT_INDEX = (
    "This server has no index, so there is nothing to search or to answer from. Write one with "
    "`hf-unigd index`, and start the server with `--index`."
)


def add_page(app: FastAPI, name: str, limits: Limits, has_index: bool, api_key: str | None) -> asyncio.Event:
    """
    Puts the page at `/`, behind all routes that the app has.

    Args:
        app: The app.
        name: The name of the model.
        limits: Of requests.
        has_index: Whether there is something to search.
        api_key: The key that the app asks for.

    Returns:
        An event that ends the streams to open pages, which would keep the server from ending.
    """
    page = make_page(Actions(PageClient(app, api_key)), name, limits, has_index)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        # A picture goes on to the API in base64, which is a third longer.
        max_file_size=limits.max_body // 2,
        theme=gr.themes.Default(  # whose own fonts come from elsewhere
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=fragments.CSS,
    )
    (mounted,) = [route.app for route in app.routes if isinstance(route, Mount)]
    return cast(App, mounted).stop_event


def make_page(actions: Actions, name: str, limits: Limits, has_index: bool) -> gr.Blocks:
    """The page of a model. Its arguments are those of [`add_page`]."""
    # What readers upload is removed after an hour.
    with gr.Blocks(title=f"{name} · hf-unigd", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"**{name}**: one vision-language model that finds pictures and texts, and answers from them.")
        with gr.Tab("Search"):
            if has_index:
                query, k = _box("What to look for"), _count("Results", 12)
                _on_submit(gr.Button("Search", variant="primary"), actions.search, [query, k])
            else:
                gr.Markdown(_WITHOUT_INDEX)
        with gr.Tab("Ask"):
            if has_index:
                question, k = _box("A question"), _count("Entries to answer from", 3)
                _on_submit(gr.Button("Ask", variant="primary"), actions.ask, [question, k])
            else:
                gr.Markdown(_WITHOUT_INDEX)
        with gr.Tab("Align"):
            gr.Markdown("Which pictures and sentences of two sequences match, by the alignment kernel on embeddings.")
            a, b = _box("First sequence"), _box("Second sequence")
            _on_submit(gr.Button("Align", variant="primary"), actions.align, [a, b])
        with gr.Tab("Inside"):
            gr.Markdown(
                "The likeliest tokens where the model reads the embedding, and before training if `--before` is set."
            )
            sequence = _box("A text, pictures, or both")
            _on_submit(gr.Button("Look", variant="primary"), actions.look, [sequence])
    return page.queue(default_concurrency_limit=limits.max_requests, max_size=limits.max_requests)


def _box(label: str) -> gr.MultimodalTextbox:
    # Files of any kind: what is no picture is told so by the server, which alone looks into them.
    box = gr.MultimodalTextbox(
        label=label,
        placeholder="Type, or add a picture",
        file_count="multiple",
        sources=["upload"],
        submit_btn=False,
        max_plain_text_length=100_000,
    )
    move = box.async_move_resource_to_block_cache

    async def move_upload(path: str | Path | None) -> str | None:
        if path is not None and not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
            raise gr.Error("Only files that were uploaded are taken.", print_exception=False)
        return await move(path)

    # Of an app that is mounted, gradio opens every file of this machine, and every address, that a client names. A
    # subclass would make it write a stub beside this file.
    box.async_move_resource_to_block_cache = move_upload  # type: ignore[assignment,method-assign]
    return box


def _count(label: str, value: int) -> gr.Slider:
    return gr.Slider(1, 50, value, step=1, label=label)


def _on_submit(button: gr.Button, action, inputs: list[gr.components.Component]) -> None:
    shown = gr.HTML()
    boxes = [each.submit for each in inputs if isinstance(each, gr.MultimodalTextbox)]
    gr.on([button.click, *boxes], action, inputs, shown, api_visibility="private", show_progress="minimal")
