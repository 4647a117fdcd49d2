"""The HTTP application of one server: OpenAI's API, health checks and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fastapi
from starlette.middleware.cors import CORSMiddleware

from dance_jax.serve import chat, completions, dashboard, errors, placement, status, tokens
from dance_jax.serve.guard import KeyGuard
from dance_jax.serve.info import RouteContext, ServeInfo
from dance_jax.serve.lenient import Lenient
from dance_jax.serve.metrics import HttpConnections, Metrics
from dance_jax.serve.placement_state import PlacementState
from dance_jax.serve.prompts import Prompts
from dance_jax.serve.view import Views

if TYPE_CHECKING:
    from dance_jax.serve.queue import RequestQueue

__all__ = ["ServeInfo", "create_app"]


class _App(fastapi.FastAPI):
    """FastAPI with an OpenAPI schema that matches this API's errors."""

    def openapi(self) -> dict[str, Any]:
        described = super().openapi()
        for methods in described["paths"].values():
            for operation in methods.values():
                # FastAPI's status for invalid fields; this API answers 400 instead.
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            described["components"]["schemas"].pop(unused, None)
        return described


def create_app(
    queue: RequestQueue,
    info: ServeInfo,
    experts: PlacementState,
    connections: HttpConnections | None = None,
    views: Views | None = None,
) -> fastapi.FastAPI:
    """Create the ASGI application of a server.

    Args:
        queue: takes the requests.
        info: describes the server.
        experts: the current placement of experts.
        connections: the HTTP server's counts, for the metrics.
        views: what a dashboard shows; None: only this server.
    """
    views = views or Views(queue, info, experts)
    server = RouteContext(
        queue,
        info,
        Prompts(info.tokenizer, info.max_model_len, info.model_config.vocab_size),
        Metrics(
            queue,
            experts,
            connections or HttpConnections(),
            info.model,
            info.servers,
            info.rank,
            views.latest,
        ),
        experts,
        views,
    )
    # No documentation pages: they load scripts from other hosts. The schema is at /openapi.json.
    app = _App(title="dance_jax", docs_url=None, redoc_url=None, redirect_slashes=False)
    for module in (completions, chat, tokens, status, placement, dashboard):
        app.include_router(module.routes(server))
    errors.install(app)
    # What is added last comes first.
    app.add_middleware(KeyGuard, keys=info.keys)
    app.add_middleware(Lenient)
    # Browsers ask first, without a key, whether a page may send its request.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=info.allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
    )
    return app
