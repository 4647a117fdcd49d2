"""Who may use the server."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from dance_jax.serve.errors import ApiError, error_response
from dance_jax.serve.status import OPEN_PATHS


class KeyGuard:
    """Lets in who has the key, before anything of a request is read.

    Args:
        app: what is guarded, but for OPEN_PATHS.
        key: what requests carry as bearer token.
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
            "a key is needed: send it as header, Authorization: Bearer KEY",
            code="invalid_api_key",
        )
        response = error_response(error)
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        # In a time that says nothing about where the two differ.
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)
