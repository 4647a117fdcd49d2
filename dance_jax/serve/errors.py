"""HTTP errors in the form of OpenAI's API."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dance_jax.serve.queue import QueueFull, Unavailable

#: Status -> (error type, description in the OpenAPI schema).
_KINDS = {
    400: ("invalid_request_error", "A field is invalid or its value is not supported"),
    401: ("authentication_error", "The API key is missing or wrong"),
    403: ("permission_error", "The service does not allow this"),
    404: ("not_found_error", "The model does not exist"),
    405: ("invalid_request_error", "The path does not support this method"),
    408: ("invalid_request_error", "The request did not arrive in time"),
    409: ("conflict_error", "Nothing is under way that the request is about"),
    413: ("invalid_request_error", "The body is too large"),
    415: ("invalid_request_error", "The body is not application/json"),
    429: ("rate_limit_error", "Too many requests are waiting; retry after Retry-After seconds"),
    500: ("server_error", "The server failed"),
    503: (
        "server_error",
        "The server is starting or stopping; retry after Retry-After seconds",
    ),
}
#: What to say of a path that there is not, or not for this method.
_WRONG_PATHS = {
    404: "no such path; the API is described at /openapi.json, and begins with /v1",
    405: "the path does not support this method",
}
#: Message for an exception that nobody expected.
_FAILED = "internal server error: see the server's log"


class ErrorDetail(BaseModel):
    """The error of an `ErrorAnswer`."""

    message: str
    type: str
    #: The invalid field.
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Body of every error response."""

    error: ErrorDetail


class ApiError(HTTPException):
    """Ends an HTTP call with a status and an ErrorAnswer.

    Args:
        status: HTTP status, a key of `_KINDS`.
        message: what was wrong and what to do.
        param: the invalid field.
        code: error code for programs, e.g. "model_not_found".
        retry_after_s: seconds that the client should wait before it retries.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        headers = {} if retry_after_s is None else {"Retry-After": str(math.ceil(retry_after_s))}
        super().__init__(status, message, headers)
        self.answer = error_answer(status, message, param, code)


def error_answer(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> ErrorAnswer:
    """The body for an error status of this server or of the framework."""
    kind = _KINDS[status if status in _KINDS else 500 if status >= 500 else 400][0]
    return ErrorAnswer(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def refused(error: QueueFull | Unavailable) -> ApiError:
    """The API error for a request that the queue refused."""
    status = 429 if isinstance(error, QueueFull) else 503
    wait_s = max(1, math.ceil(error.retry_after_s))
    message = f"{error}; try again in {wait_s} s"
    return ApiError(status, message, code=error.reason, retry_after_s=wait_s)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for a route that can end with these statuses."""
    return {status: {"model": ErrorAnswer, "description": _KINDS[status][1]} for status in statuses}


def error_response(error: HTTPException) -> JSONResponse:
    """The response for an error."""
    if isinstance(error, ApiError):
        answer = error.answer
    else:
        answer = error_answer(error.status_code, error.detail)
    return JSONResponse(answer.model_dump(), error.status_code, error.headers)


def install(app: fastapi.FastAPI) -> None:
    """Make the app answer every error in OpenAI's form."""

    @app.exception_handler(HTTPException)
    async def _(request: fastapi.Request, error: HTTPException) -> JSONResponse:
        if not isinstance(error, ApiError) and error.status_code in _WRONG_PATHS:
            what = _WRONG_PATHS[error.status_code]
            where = f"{request.method} {request.url.path}"[:200]
            error = HTTPException(error.status_code, f"{where}: {what}", error.headers)
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def _(_: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_first_wrong_field(error.errors()))

    @app.exception_handler(Exception)
    async def _(_: fastapi.Request, error: Exception) -> JSONResponse:
        # Starlette logs the error; its text may hold internals, so users do not get it.
        return error_response(api_error(error))


class AlwaysAnswers:
    """Middleware around the whole application: a call that ends without an answer gets one.

    Without it, the HTTP server would answer "Internal Server Error" as plain text.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def sent(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except BaseException as error:
            if started or scope["type"] != "http":
                raise
            await error_response(api_error(error))(scope, receive, send)
            if not isinstance(error, asyncio.CancelledError):
                raise


def api_error(error: BaseException) -> ApiError:
    """The API error for a call that an exception has ended."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return refused(Unavailable("the server is shutting down"))
    return ApiError(500, _FAILED)


def _first_wrong_field(errors: Sequence[Any]) -> ApiError:
    """A 400 error with the first of pydantic's validation errors."""
    first = errors[0]
    field = _field(first["loc"])
    if first["type"] == "extra_forbidden":
        reason = "unknown field: this server does not support it"
    elif first["type"] == "missing" and not field:
        reason = "must be a JSON object"
    else:
        reason = first["msg"]
    given = "" if first["type"] in ("missing", "extra_forbidden") else _shown(first.get("input"))
    return ApiError(400, f"{field or 'body'}: {reason}{given}", param=field or None)


def _field(location: Sequence[int | str]) -> str:
    """("body", "messages", 0, "content", "<parts>") -> "messages[0].content"."""
    name = ""
    if location[-1] == "[key]":  # an invalid key of a mapping: name the mapping
        location = location[:-2]
    for part in location[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif not part.startswith("<"):  # a tag of a union in angle brackets is not a field
            name += f".{part}" if name else part
    return name[:80]


def _shown(value: Any) -> str:
    """The given value as a message suffix; "" for lists and objects, which can be long."""
    if value is None or isinstance(value, bool | int | float):
        return f"; got {json.dumps(value)[:80]}"
    return f"; got {json.dumps(value[:80])}" if isinstance(value, str) else ""
