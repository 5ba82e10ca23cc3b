"""A server in a thread of this process, and what requests of it are made of."""

import base64
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import httpx
import openai
from PIL import Image

from hf_unigd.retrieval import EmbeddingIndex
from hf_unigd.serving.app import create_app
from hf_unigd.serving.engine import Engine
from hf_unigd.serving.limits import Limits
from hf_unigd.serving.metrics import Metrics
from hf_unigd.serving.server import Server, bind


NAME = "tiny"


@dataclass
class Running:
    """
    Attributes:
        address: Such as `http://127.0.0.1:4711`.
        engine: Runs the model.
        server: Answers requests.
    """

    address: str
    engine: Engine
    server: Server
    api_key: str | None = None

    def client(self, **kwargs) -> openai.OpenAI:
        key = self.api_key or "none"
        return openai.OpenAI(**{"base_url": f"{self.address}/v1", "api_key": key, "max_retries": 0, **kwargs})


@contextmanager
def serving(
    model,
    processor,
    index: EmbeddingIndex | None = None,
    api_key=None,
    page=False,
    before=None,
    allowed_hosts=(),
    **limits,
) -> Iterator[Running]:
    engine = Engine(model, processor, Limits(**limits), Metrics())
    engine.start()
    bound = bind("127.0.0.1", 0)
    server = Server(create_app(engine, NAME, index, api_key, page, before, allowed_hosts), engine)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{bound.getsockname()[1]}", engine, server, api_key)
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join()
        engine.stop()


@contextmanager
def started_process(words: Sequence[str], **kwargs) -> Iterator[tuple[subprocess.Popen, str, list[str]]]:
    """
    A process that runs `hf-unigd serve`, its address, and the lines that it has printed.

    Args:
        words: The command.
        kwargs: Of `subprocess.Popen`: `cwd`, and `env`, which is added to that of this process.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **kwargs
    )
    lines: list[str] = []
    thread = threading.Thread(target=lambda: lines.extend(process.stdout))
    thread.start()
    try:
        eventually(lambda: process.poll() is not None or _address_in(lines), seconds=200)
        assert process.poll() is None, "".join(lines)
        eventually(lambda: _is_healthy(_address_in(lines)))
        yield process, _address_in(lines), lines
    finally:
        process.kill()
        thread.join()
        process.wait()


def _address_in(lines: list[str]) -> str | None:
    found = re.findall(r"Serving \S+ at (http\S+)/v1", "".join(list(lines)))
    return found[0].replace("0.0.0.0", "127.0.0.1") if found else None


def _is_healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").json() == {"status": "ok"}
    except httpx.ConnectError:
        return False


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    file = BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def image_part(image: Image.Image) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def send(address: str, path: str, body: bytes) -> socket.socket:
    """A connection that has sent a request, and reads no answer."""
    host, _, port = address.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


def eventually(condition: Callable[[], Any], seconds: float = 30) -> None:
    """Waits until something is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come true"
        time.sleep(0.01)


def in_threads(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each call returns or raises, all at once."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.exception() or future.result() for future in futures]
