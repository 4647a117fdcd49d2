"""API key authentication."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from dance_jax.serve.client import KEY_NUMBER
from dance_jax.serve.errors import ApiError, error_response
from dance_jax.serve.keys import Keys
from dance_jax.serve.status import OPEN_PATHS


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith("/dashboard/")


class KeyGuard:
    """Middleware that refuses requests without an API key before it reads their bodies.

    Args:
        app: the guarded application; OPEN_PATHS and the files of the dashboard need no key.
        keys: one of which requests must carry.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if (number := self._keys.number(given)) is not None:
            await self._app({**scope, KEY_NUMBER: number}, receive, send)
            return
        error = ApiError(
            401,
            "the API key is missing or wrong: send the header Authorization: Bearer KEY",
            code="invalid_api_key",
        )
        response = error_response(error)
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)
