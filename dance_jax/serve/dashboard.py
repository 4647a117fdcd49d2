"""/dashboard, the page to look at, and what feeds it."""

from __future__ import annotations

import contextlib
import importlib.resources
import mimetypes
from importlib.resources.abc import Traversable
from typing import Annotated, Any

import fastapi
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

from dance_jax.serve.bodies import JsonRoute
from dance_jax.serve.delivery import Disconnected, while_connected
from dance_jax.serve.errors import ApiError, documented, refused
from dance_jax.serve.info import RouteContext
from dance_jax.serve.queue import Unavailable
from dance_jax.serve.requests import Body
from dance_jax.serve.view import MAX_STEPS, Views

#: The page's files may load nothing from elsewhere, but try other servers of the service.
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; connect-src *; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
#: Types that the machine's own table may lack or have wrong.
_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".html": "text/html",
    ".svg": "image/svg+xml",
}


class TraceRequest(Body):
    """Body of /trace."""

    tokens: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 4


class TraceAnswer(BaseModel):
    """Steps in detail; times are seconds since the first one began."""

    steps: list[dict[str, Any]]


class Drained(BaseModel):
    """Answer of /servers/{name}/drain."""

    name: str
    text: str


class _Events(Response):
    """The views as server-sent events, until the client hangs up or the server drains."""

    media_type = "text/event-stream"

    def __init__(self, views: Views) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._views = views

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(Disconnected):
            await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with contextlib.aclosing(self._views.events()) as events:
            async for name, data in events:
                body = b"event: %s\ndata: %s\n\n" % (name.encode(), data)
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def routes(server: RouteContext) -> fastapi.APIRouter:
    """The routes of this module."""
    router = fastapi.APIRouter(route_class=JsonRoute)
    files = dict(_files(importlib.resources.files("dance_jax.serve") / "page"))

    @router.get(
        "/dashboard",
        response_class=Response,
        responses={
            200: {"description": "The page", "content": {"text/html": {}}},
            307: {"description": "The page is at /dashboard/"},
        },
    )
    async def dashboard(request: fastapi.Request) -> Response:
        """A page that shows what all servers do."""
        # The page's own addresses are relative to /dashboard/, also below a proxy's prefix.
        if not request.scope.get("raw_path", b"").endswith(b"/"):
            return RedirectResponse("dashboard/")
        return _file(files, "index.html")

    @router.get("/dashboard/{path:path}", include_in_schema=False)
    async def file(path: str) -> Response:
        """A file of the page."""
        return _file(files, path)

    @router.get(
        "/events",
        response_class=Response,
        responses=documented(401)
        | {200: {"description": "Server-sent events", "content": {"text/event-stream": {}}}},
    )
    async def events() -> Response:
        """What all servers do, once a second, as server-sent events."""
        return _Events(server.views)

    @router.post("/trace", responses=documented(400, 401, 409, 413, 415, 503))
    async def trace(body: TraceRequest) -> TraceAnswer:
        """The next steps of this server that compute tokens of answers, in detail."""
        try:
            found = await server.views.waterfall(body.tokens)
        except Unavailable as error:
            raise refused(error) from error
        except TimeoutError:
            raise ApiError(409, "no token was computed: ask while requests run") from None
        if found.why:
            raise ApiError(409, found.why)
        return TraceAnswer(steps=found.steps)

    @router.post("/servers/{name}/drain", responses=documented(400, 401, 403, 404, 503))
    async def drain(name: str) -> Drained:
        """Let a server finish its requests and leave, as `dance-jax hosts drain`."""
        if not server.info.keys.needed:
            raise ApiError(403, "draining a server needs a service with a key: --api-key")
        if name not in server.info.seated.values():
            raise ApiError(404, f"name: no server is named {name!r:.80}", param="name")
        try:
            why = await server.views.drain(name)
        except Unavailable as error:
            raise refused(error) from error
        if why:
            raise ApiError(400, f"{name} cannot leave: {why}")
        text = (
            f"{name} finishes its requests and leaves; `dance-jax hosts add {name}` brings it back"
        )
        return Drained(name=name, text=text)

    return router


def _files(folder: Traversable, prefix: str = "") -> list[tuple[str, bytes]]:
    """Paths and contents of all files of the page."""
    found = []
    for each in folder.iterdir():
        if each.is_dir():
            found += _files(each, f"{prefix}{each.name}/")
        else:
            found.append((prefix + each.name, each.read_bytes()))
    return found


def _file(files: dict[str, bytes], path: str) -> Response:
    if path not in files:
        raise ApiError(404, f"/dashboard/{path:.80}: no such file")
    suffix = path[path.rfind(".") :]
    kind = _TYPES.get(suffix) or mimetypes.guess_type(path)[0] or "application/octet-stream"
    return Response(files[path], media_type=kind, headers=_HEADERS)
