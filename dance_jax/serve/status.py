"""GET routes: health, readiness, metrics and the served model."""

from __future__ import annotations

import importlib.metadata

import fastapi
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from dance_jax.serve.answers import Health, ModelCard, ModelList, Readiness, Version
from dance_jax.serve.errors import documented
from dance_jax.serve.info import RouteContext, ServeInfo

#: Paths that need no API key, for supervisors and monitoring.
OPEN_PATHS = frozenset({"/health", "/ping", "/ready", "/metrics", "/version", "/dashboard"})


def routes(server: RouteContext) -> fastapi.APIRouter:
    """The routes of this module."""
    router = fastapi.APIRouter()
    info = server.info

    @router.get("/health")
    async def health() -> Health:
        """200 as long as the front end's process runs; says which servers of the service run."""
        absent, seated = server.experts.absent, info.seated.items()
        return Health(
            epoch=server.experts.epoch,
            alive=[name for rank, name in seated if rank not in absent],
            lost=[name for rank, name in seated if rank in absent],
        )

    @router.get("/ping")
    async def ping() -> dict[str, str]:
        """200 as long as the front end's process runs."""
        return {}

    @router.get("/version")
    async def version() -> Version:
        """The version of dance_jax."""
        return Version(version=importlib.metadata.version("dance-jax"))

    @router.get("/ready", response_model=Readiness, responses={503: {"model": Readiness}})
    async def ready() -> Response:
        """200 if the engine is warm and completes steps; otherwise 503."""
        answer = Readiness(ready=server.queue.ready)
        return JSONResponse(answer.model_dump(), 200 if answer.ready else 503)

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(server.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/models", responses=documented(401))
    async def models() -> ModelList:
        """List the served model."""
        return ModelList(data=[_card(info, name) for name in info.models])

    @router.get("/v1/models/{model:path}", responses=documented(401, 404))
    async def model(model: str) -> ModelCard:
        """Describe the served model."""
        info.check_model(model)
        return _card(info, model)

    return router


def _card(info: ServeInfo, name: str) -> ModelCard:
    return ModelCard(id=name, created=info.created, max_model_len=info.max_model_len)
