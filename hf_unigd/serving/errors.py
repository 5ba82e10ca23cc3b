"""Errors in the form of OpenAI's API."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


logger = logging.getLogger(__name__)


class ApiError(Exception):
    """
    What a client is told.

    Args:
        status: The HTTP status.
        message: What is wrong, and what to do.
        param: The field of the request that is wrong.
        kind, code: OpenAI's `type` and `code`.
        headers: Headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = headers

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an error. One that is not meant for clients is logged, and nothing of it is told."""
    if isinstance(error, ApiError):
        return error
    logger.error("A request failed.", exc_info=error)
    return ApiError(500, "The server failed to answer. Its log says why.", kind="server_error")


def add_error_handlers(app: FastAPI) -> None:
    """Gives the errors of FastAPI the form of OpenAI's. [`~hf_unigd.serving.guard.Guard`] does so with
    all others."""

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _of_validation(error.errors()[0]).response()

    @app.exception_handler(HTTPException)
    def of_http(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}").response()


def _of_validation(error: dict[str, Any]) -> ApiError:
    """An error of pydantic."""
    place = [part for part in error["loc"] if part != "body"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".") or None
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"`{param}` is not known here. Leave it out.", param)
    message = error["msg"].removeprefix("Value error, ")
    return ApiError(400, f"`{param}`: {message}" if param else message, param)
