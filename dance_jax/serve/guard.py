"""API key authentication."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from dance_jax.serve.errors import ApiError, error_response
from dance_jax.serve.status import OPEN_PATHS


class KeyGuard:
    """Middleware that refuses requests without the API key before it reads their bodies.

    Args:
        app: the guarded application; OPEN_PATHS need no key.
        key: the bearer token that requests must carry.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._admits(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "the API key is missing or wrong: send the header Authorization: Bearer KEY",
            code="invalid_api_key",
        )
        response = error_response(error)
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        # Constant-time comparison: the time must not reveal where the keys differ.
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)
