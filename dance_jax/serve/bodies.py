"""How bodies are read: bounded, JSON only, and nothing that is not JSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import fastapi
import pydantic_core
from fastapi.routing import APIRoute

from dance_jax.serve.errors import ApiError

#: Bytes of the largest body.
MAX_BODY = 4 << 20
#: Seconds that one may take to come.
BODY_S = 60.0
#: Entries of one list or object; lists and objects in all; token ids in all. What follows looks at
#: each, and complains about each, while all users of this server wait.
MAX_ENTRIES, MAX_CONTAINERS, MAX_TOKEN_IDS = 1024, 4096, 1 << 18
#: Fields that may hold long lists of token ids.
_TOKEN_FIELDS = ("prompt", "tokens")


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

    async def body(self) -> bytes:
        try:
            async with asyncio.timeout(BODY_S):
                return await super().body()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_S:.0f} s") from None

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            try:
                # Python's own reader takes NaN, and halves of surrogate pairs.
                self._json = pydantic_core.from_json(body, allow_inf_nan=False)
            except ValueError as error:
                raise ApiError(400, f"the body is not JSON: {error}") from error
            check_extent(self._json)
        return self._json


def check_extent(body: Any) -> None:
    """Bounds how much there is to look at, at little cost itself.

    Raises:
        ApiError: 400, with the field that holds too much.
    """
    containers = ids = 0
    waiting = [("", body)] if isinstance(body, dict | list) else []
    while waiting:
        field, value = waiting.pop()
        containers += 1
        if field in _TOKEN_FIELDS and _are_ids(value, MAX_TOKEN_IDS - ids):
            ids += len(value)
            continue
        if len(value) > MAX_ENTRIES or containers > MAX_CONTAINERS:
            limit = f"lists and objects of at most {MAX_ENTRIES} entries are read"
            if field in _TOKEN_FIELDS:
                limit += f", and {MAX_TOKEN_IDS} token ids in all"
            name = field[:80] or "body"
            raise ApiError(400, f"{name}: holds too much: {limit}", param=field[:80] or None)
        entries = value.items() if isinstance(value, dict) else ((field, each) for each in value)
        waiting += [
            (field or str(key), each) for key, each in entries if isinstance(each, dict | list)
        ]


def _are_ids(value: Any, most: int) -> bool:
    """A list of whole numbers alone, and not more of them than that."""
    return isinstance(value, list) and len(value) <= most and all(type(n) is int for n in value)


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
