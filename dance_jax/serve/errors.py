"""Everything that goes wrong in an HTTP call, in the form of OpenAI's API."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dance_jax.serve.queue import QueueFull, Unavailable

#: Status -> (type of the error, what the API's description says about it).
_KINDS = {
    400: ("invalid_request_error", "A field is wrong, or what it asks for is not supported"),
    401: ("authentication_error", "The key is missing or wrong"),
    404: ("not_found_error", "There is no such model"),
    405: ("invalid_request_error", "The path has no such method"),
    408: ("invalid_request_error", "The body does not come"),
    413: ("invalid_request_error", "The body is too large"),
    415: ("invalid_request_error", "The body is not application/json"),
    429: ("rate_limit_error", "Too many requests wait; Retry-After says when to come again"),
    500: ("server_error", "The server failed"),
    503: ("server_error", "The server starts or stops; Retry-After says when to come again"),
}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    #: The field that is wrong.
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail


class ApiError(HTTPException):
    """Ends an HTTP call with a status and an ErrorAnswer.

    Args:
        status: of HTTP, one that `_KINDS` knows.
        message: what was wrong and what to do.
        param: the field that was wrong.
        code: for programs, e.g. "model_not_found".
        retry_after_s: seconds until another try makes sense.
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
    """The body for a status that this server or the framework gives."""
    kind = _KINDS[status if status in _KINDS else 500 if status >= 500 else 400][0]
    return ErrorAnswer(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def refused(error: QueueFull | Unavailable) -> ApiError:
    """What a user hears when the queue takes no request."""
    status, code = (429, "queue_full") if isinstance(error, QueueFull) else (503, "unavailable")
    wait_s = max(1, math.ceil(error.retry_after_s))
    message = f"{error}; try again in {wait_s} s"
    return ApiError(status, message, code=code, retry_after_s=wait_s)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that can end with these statuses."""
    return {status: {"model": ErrorAnswer, "description": _KINDS[status][1]} for status in statuses}


def error_response(error: HTTPException) -> JSONResponse:
    """The answer to a call that ended with this error."""
    if isinstance(error, ApiError):
        answer = error.answer
    else:
        answer = error_answer(error.status_code, error.detail)
    return JSONResponse(answer.model_dump(), error.status_code, error.headers)


def install(app: fastapi.FastAPI) -> None:
    """Answer every error of the app's routes in OpenAI's form."""

    @app.exception_handler(HTTPException)
    async def _(_: fastapi.Request, error: HTTPException) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def _(_: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_first_wrong_field(error.errors()))

    @app.exception_handler(Exception)
    async def _(_: fastapi.Request, error: Exception) -> JSONResponse:
        # Starlette logs it; users learn nothing of the inside.
        return error_response(ApiError(500, "the server failed; its log says why"))


def _first_wrong_field(errors: Sequence[Any]) -> ApiError:
    """400 with the first of pydantic's complaints."""
    first = errors[0]
    field = _field(first["loc"])
    if first["type"] == "extra_forbidden":
        reason = "unknown field; this server supports no such parameter"
    elif first["type"] == "missing" and not field:
        reason = "a JSON object is needed"
    else:
        reason = first["msg"]
    given = "" if first["type"] in ("missing", "extra_forbidden") else _shown(first.get("input"))
    return ApiError(400, f"{field or 'body'}: {reason}{given}", param=field or None)


def _field(location: Sequence[int | str]) -> str:
    """("body", "messages", 0, "content", "<parts>") -> "messages[0].content"."""
    name = ""
    if location[-1] == "[key]":  # of a mapping: the mapping is the field
        location = location[:-2]
    for part in location[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif not part.startswith("<"):  # which of several forms the value has, not a field
            name += f".{part}" if name else part
    return name[:80]


def _shown(value: Any) -> str:
    """What was given, where it is short: a whole body would be no help."""
    if value is None or isinstance(value, bool | int | float):
        return f"; got {json.dumps(value)[:80]}"
    return f"; got {json.dumps(value[:80])}" if isinstance(value, str) else ""
