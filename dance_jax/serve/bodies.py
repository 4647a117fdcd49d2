"""How bodies are read: bounded, JSON only, and nothing that is not JSON."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import fastapi
import pydantic_core
from fastapi.routing import APIRoute

from dance_jax.serve.errors import ApiError

#: Bytes of the largest body.
MAX_BODY = 4 << 20


class _JsonRequest(fastapi.Request):
    """A request whose body is JSON of at most MAX_BODY bytes."""

    async def stream(self) -> AsyncGenerator[bytes]:
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"Content-Type: application/json is needed; got {kind!r:.80}")
        # What the header says is known before the first byte comes; it may say nothing.
        announced = self.headers.get("content-length", "")[:19]
        _check_size(int(announced) if announced.isdecimal() else 0)
        size = 0
        async for chunk in super().stream():
            size += len(chunk)
            _check_size(size)
            yield chunk

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            try:
                # Python's own reader takes NaN, and halves of surrogate pairs.
                self._json = pydantic_core.from_json(body, allow_inf_nan=False)
            except ValueError as error:
                raise ApiError(400, f"the body is not JSON: {error}") from error
        return self._json


def _check_size(size: int) -> None:
    if size > MAX_BODY:
        raise ApiError(413, f"the body is too large: at most {MAX_BODY} bytes are read")


class JsonRoute(APIRoute):
    """A route with a body of JSON."""

    def get_route_handler(self) -> Callable[[fastapi.Request], Coroutine[Any, Any, Any]]:
        handler = super().get_route_handler()

        async def handle(request: fastapi.Request) -> fastapi.Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle
