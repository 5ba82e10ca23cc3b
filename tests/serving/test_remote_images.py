"""Images at addresses, which are fetched from public ones alone."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import openai
import pytest
import torch

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.serving import remote_images
from serving_cases import NAME, serving
from tiny_models import make_image, make_vlm


@contextmanager
def images_at(host, target=""):
    """A server of an image, whose `/away` leads to `target`: its address, and the paths that are asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            content = {"/a.png": png(), "/text": b"no image", "/huge": b"0" * 200_000}.get(self.path, b"")
            self.send_response(302 if self.path in ("/away", "/round") else 200 if content else 404)
            if self.path in ("/away", "/round"):
                self.send_header("Location", target if self.path == "/away" else "/round")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer((host, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def png():
    file = BytesIO()
    make_image(1).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def pair():
    tiny = make_vlm()
    return UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)


@pytest.fixture(scope="module")
def server(pair):
    with serving(*pair, allow_remote_images=True, max_body_mb=0.1) as running:
        yield running


@pytest.fixture
def first_is_public(monkeypatch):
    """127.0.0.1 stands for a public address, and all others of this machine for private ones."""
    monkeypatch.setattr(remote_images, "is_public", lambda address: address == "127.0.0.1")


def embed(server, url):
    image = {"type": "image_url", "image_url": {"url": url}}
    return server.client().embeddings.create(model=NAME, input=[image]).data[0].embedding


@pytest.mark.parametrize("path", ["/a.png", "/away"])
def test_an_image_is_fetched(server, pair, first_is_public, path):
    model, processor = pair
    with images_at("127.0.0.1", target="/a.png") as (address, _):
        vector = embed(server, address + path)
    with torch.no_grad():
        wanted = model.embed(**processor.process_sequences([[make_image(1)]]))[0]
    np.testing.assert_allclose(vector, wanted, atol=1e-5)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0.0.0.0"])
def test_private_addresses_are_not_connected_to(server, host):
    with images_at("127.0.0.1") as (address, asked):
        port = address.rpartition(":")[2]
        with pytest.raises(openai.BadRequestError, match=r"does not lead to a public address|cannot be fetched"):
            embed(server, f"http://{host}:{port}/a.png")
    assert asked == []


def test_a_redirect_to_a_private_address_is_not_followed(server, first_is_public):
    with (
        images_at("127.0.0.2") as (private, seen),
        images_at("127.0.0.1", f"{private}/a.png") as (address, asked),
        pytest.raises(openai.BadRequestError, match="does not lead to a public address"),
    ):
        embed(server, f"{address}/away")
    assert (asked, seen) == (["/away"], [])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", "cannot be fetched"),
        ("/round", "cannot be fetched"),
        ("/huge", "an image of more than 100,000 bytes"),
        ("/text", "has a corrupt image"),
    ],
)
def test_what_is_no_image_is_refused(server, first_is_public, path, message):
    with images_at("127.0.0.1") as (address, _), pytest.raises(openai.BadRequestError, match=message):
        embed(server, address + path)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.20.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # where clouds keep credentials
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:a00:1::1", False),  # 10.0.0.1 by 6to4
        ("64:ff9b::a00:1", False),  # 10.0.0.1 by a gateway
        ("64:ff9b::808:808", True),
    ],
)
def test_public_addresses(address, public):
    assert remote_images.is_public(address) == public
