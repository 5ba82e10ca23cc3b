"""What stands before the app: the key, the limits of requests and their bodies, clients that go away, and counts."""

import asyncio
import base64
import binascii
import contextlib
import re
import secrets
import time
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, as_api_error
from .limits import Limits
from .metrics import Metrics


_BODY_SECONDS = 60
_OPEN_PATHS = ("/health",)


class Guard:
    """
    ASGI middleware. A request is refused before its body is read if it lacks the key or if too many are in work, and
    its work is cancelled when its client goes away.

    Args:
        app: What answers.
        limits: Limits of requests.
        metrics: What is counted.
        api_key: The key that all paths but `/health` ask for. Without one, requests must name this machine as their
            host, so that no page in a browser can reach it by a name of its own that leads here (DNS rebinding).
        allowed_hosts: Other names that requests without a key may give their host, in small letters.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        api_key: str | None,
        allowed_hosts: Collection[str] = (),
    ):
        self.app = app
        self.limits = limits
        self.metrics = metrics
        self.api_key = api_key
        self.allowed_hosts = allowed_hosts
        self._in_work = 0
        metrics.in_work.set_function(lambda: self._in_work)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, has_begun = time.perf_counter(), False
        status = 499  # the client has gone before there was an answer

        async def counted(message: Message) -> None:
            nonlocal has_begun, status
            if message["type"] == "http.response.start":
                has_begun, status = True, message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, counted)
        except Exception as error:
            told = as_api_error(error)
            if not has_begun:
                await told.response()(scope, receive, counted)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_key(scope)
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if self._in_work >= self.limits.max_requests:
            raise ApiError(
                429,
                f"{self._in_work} requests are in work, and no more are taken. Try again later.",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self._in_work += 1
        try:
            body = await self._read(scope, receive)
            await self._run(body, scope, receive, send)
        finally:
            self._in_work -= 1

    def _check_key(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self.api_key is None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = re.sub(r":\d+$", "", host).lower()
            if not _is_this_machine(name) and name not in self.allowed_hosts:
                raise ApiError(
                    403,
                    f"The host {host[:80]!r} is not this machine. Ask at 127.0.0.1, set a key (`--api_key`), or allow "
                    "the name (`--allowed_hosts`).",
                )
            return
        if scope["path"] in _OPEN_PATHS:
            return
        given = _key_in(headers.get(b"authorization", b""))
        if not secrets.compare_digest(given, self.api_key.encode()):
            raise ApiError(
                401,
                "The API key is missing or wrong. Send the header `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Basic realm="hf-unigd: any name, and the API key"'},
            )

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        try:
            return await asyncio.wait_for(self._body(scope, receive), _BODY_SECONDS)
        except asyncio.TimeoutError as error:
            raise ApiError(408, f"The body of the request took more than {_BODY_SECONDS} seconds.") from error

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        body, most = bytearray(), self.limits.max_body
        while True:
            if len(body) > most or (declared.isdigit() and int(declared) > most):
                raise ApiError(413, f"The body of the request has more than {most:,} bytes (`--max_body_mb`).")
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(499, "The client has gone.")
            body += message.get("body", b"")
            if not message.get("more_body", False) and len(body) <= most:
                return bytes(body)

    async def _run(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the app until it has answered or its client has gone."""
        unread = [{"type": "http.request", "body": body, "more_body": False}]
        # After the body, the only message is that the client has gone.
        gone = asyncio.ensure_future(receive())

        async def replay() -> Message:
            return unread.pop() if unread else await asyncio.shield(gone)

        work = asyncio.ensure_future(self.app(scope, replay, send))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work


def _key_in(authorization: bytes) -> bytes:
    """The key of an `Authorization` header, which browsers send as a password; empty if there is none."""
    scheme, _, value = authorization.partition(b" ")
    if scheme == b"Bearer":
        return value
    if scheme == b"Basic":
        with contextlib.suppress(binascii.Error):
            return base64.b64decode(value, validate=True).partition(b":")[2]
    return b""


def _is_this_machine(name: str) -> bool:
    """Whether the name in a `Host` header is this machine's."""
    return name == "localhost" or bool(re.fullmatch(r"127(\.\d{1,3}){3}|\[::1\]", name))
