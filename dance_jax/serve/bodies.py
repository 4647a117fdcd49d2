"""Reading of request bodies: strict JSON of bounded size."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import fastapi
import pydantic_core
from fastapi.routing import APIRoute

from dance_jax.serve.errors import ApiError

#: Largest body, in bytes.
MAX_BODY = 4 << 20
#: Seconds within which a body must arrive.
BODY_S = 60.0
#: Limits of a body: entries of one list or object; lists and objects in total; token ids in total.
#: Validation looks at each entry and can report an error for each, on the event loop, while all
#: other users of this server wait.
MAX_ENTRIES, MAX_CONTAINERS, MAX_TOKEN_IDS = 1024, 4096, 1 << 18
#: Half of a surrogate pair, which is not a character: of a text that was cut in an emoji.
_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|"
    rb"(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
#: Fields that may hold long lists of token ids.
_TOKEN_FIELDS = ("prompt", "tokens")


class _JsonRequest(fastapi.Request):
    """A request whose body is JSON of at most MAX_BODY bytes."""

    async def stream(self) -> AsyncGenerator[bytes]:
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"Content-Type: must be application/json; got {kind!r:.80}")
        # The header, if present, gives the size before the first byte arrives.
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
            raise ApiError(408, f"the body did not arrive within {BODY_S:.0f} s") from None

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            try:
                # Python's own parser accepts NaN and lone surrogates.
                self._json = pydantic_core.from_json(body, allow_inf_nan=False)
            except ValueError as error:
                why = str(error)
                if _HALF_PAIR.search(body):
                    why += "; half of a surrogate pair: a text was cut within a character"
                raise ApiError(400, f"the body is not valid JSON: {why}") from error
            check_extent(self._json)
        return self._json


def check_extent(body: Any) -> None:
    """Refuse, at little cost, a body with too many entries to validate.

    Raises:
        ApiError: 400, with the field that has too many entries.
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
            limit = (
                f"at most {MAX_ENTRIES} per list or object and {MAX_CONTAINERS} lists and objects"
            )
            if field in _TOKEN_FIELDS:
                limit += f", and at most {MAX_TOKEN_IDS} token ids in total"
            name = field[:80] or "body"
            raise ApiError(400, f"{name}: too many entries: {limit}", param=field[:80] or None)
        entries = value.items() if isinstance(value, dict) else ((field, each) for each in value)
        waiting += [
            (field or str(key), each) for key, each in entries if isinstance(each, dict | list)
        ]


def _are_ids(value: Any, most: int) -> bool:
    """Whether the value is a list of at most `most` integers."""
    return isinstance(value, list) and len(value) <= most and all(type(n) is int for n in value)


def _check_size(size: int) -> None:
    if size > MAX_BODY:
        raise ApiError(413, f"the body is too large: at most {MAX_BODY} bytes are allowed")


class JsonRoute(APIRoute):
    """A route with a JSON body."""

    def get_route_handler(self) -> Callable[[fastapi.Request], Coroutine[Any, Any, Any]]:
        handler = super().get_route_handler()

        async def handle(request: fastapi.Request) -> fastapi.Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle
