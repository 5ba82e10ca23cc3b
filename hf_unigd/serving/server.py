"""Runs the app until it is told to stop."""

import socket
from ipaddress import ip_address
from types import FrameType

import uvicorn
from fastapi import FastAPI

from .engine import Engine


class Server(uvicorn.Server):
    """
    Refuses what waits as soon as it is told to stop, and ends once what runs is finished. Told twice, it ends at once.

    Args:
        app: The app.
        engine: Its engine.
    """

    def __init__(self, app: FastAPI, engine: Engine):
        super().__init__(uvicorn.Config(app, log_level="info", timeout_keep_alive=30, server_header=False))
        self._app = app
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if (end_of_pages := getattr(self._app.state, "end_of_pages", None)) is not None:
            end_of_pages.set()  # a page in a browser keeps a connection open
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.refuse()
        super().handle_exit(sig, frame)


def bind(host: str, port: int) -> socket.socket:
    """
    A socket that does not listen yet, so that nothing is asked before there is an answer.

    Args:
        host: The name or address to listen at.
        port: The port; 0 for any that is free.

    Raises:
        OSError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise OSError(f"The server cannot listen at `--host {host} --port {port}`: {error.strerror}.") from error
    return bound


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ip_address(bound.getsockname()[0]).is_loopback
