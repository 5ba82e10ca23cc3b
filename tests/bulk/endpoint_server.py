"""A server of the OpenAI API on this machine, which captions as a test wants."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

from PIL import Image


@dataclass
class Endpoint:
    """
    Attributes:
        answer: Returns the status and the caption of an image, for the number of the request.
        requests: The bodies of the requests, with their keys as `key`.
        most_at_once: The largest number of requests that were open at once.
    """

    answer: Callable[[int, Image.Image], tuple[int, str]]
    requests: list[dict] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""


@contextmanager
def serving(answer: Callable[[int, Image.Image], tuple[int, str]]) -> Iterator[Endpoint]:
    endpoint, lock, is_open = Endpoint(answer), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(endpoint.requests)
                endpoint.requests.append({**body, "key": self.headers["Authorization"], "path": self.path})
                is_open[0] += 1
                endpoint.most_at_once = max(endpoint.most_at_once, is_open[0])
            url = body["messages"][0]["content"][0]["image_url"]["url"]
            image = Image.open(BytesIO(base64.b64decode(url.partition(",")[2])))
            status, text = endpoint.answer(number, image)
            message = {"role": "assistant", "content": text}
            choices = [{"index": 0, "finish_reason": "stop", "message": message}]
            answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
            content = json.dumps(answer if status == 200 else {"error": {"message": text}}).encode()
            with lock:
                is_open[0] -= 1
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
