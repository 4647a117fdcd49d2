"""What clients, browsers and supervisors take for granted of any HTTP server."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class Lenient:
    """Middleware that answers HEAD like GET, and paths with a slash at the end like those without.

    The HTTP server leaves out the body of an answer to HEAD.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"].rstrip("/") or "/"
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            scope = {**scope, "path": path, "method": method}
        await self._app(scope, receive, send)
