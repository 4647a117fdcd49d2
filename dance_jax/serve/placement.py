"""/placement: the placement of experts on servers, and rebalancing on request."""

from __future__ import annotations

import fastapi

from dance_jax.config import UserError
from dance_jax.launch.control.protocol import Decision, PlacedServer
from dance_jax.placement.core import Placement
from dance_jax.serve.answers import PlacementAnswer
from dance_jax.serve.bodies import JsonRoute
from dance_jax.serve.errors import ApiError, documented, refused
from dance_jax.serve.info import RouteContext
from dance_jax.serve.queue import Unavailable
from dance_jax.serve.requests import RebalanceRequest, WantedServer

_ERRORS = documented(400, 401, 413, 415, 503)


def routes(server: RouteContext) -> fastapi.APIRouter:
    """The routes /placement and /placement/rebalance."""
    router = fastapi.APIRouter(route_class=JsonRoute)

    @router.get("/placement", responses=documented(401))
    async def placement() -> PlacementAnswer:
        """Show which experts are resident on which server."""
        return _placement(server)

    @router.post("/placement/rebalance", responses=_ERRORS)
    async def rebalance(body: RebalanceRequest) -> Decision:
        """Decide now whether experts move; they move after this call has returned, and the version
        in /placement grows when they have moved."""
        try:
            resident = None if body.servers is None else _wanted(server, body.servers)
            return await server.experts.decision(bool(body.force), bool(body.dry_run), resident)
        except Unavailable as error:
            raise refused(error) from error

    return router


def _placement(server: RouteContext) -> PlacementAnswer:
    experts = server.experts
    held = Placement(experts.layout.resident).lists()
    servers = [PlacedServer(name, held[rank]) for rank, name in server.info.seated.items()]
    return PlacementAnswer(
        version=experts.version,
        servers=servers,
        epoch=experts.epoch,
        lost=[name for rank, name in server.info.seated.items() if rank in experts.absent],
        last_decision=experts.last_decision,
    )


def _wanted(server: RouteContext, servers: list[WantedServer]) -> list[list[list[int]]]:
    """The experts that each server must hold, by rank.

    Raises:
        ApiError: 400 if this is not a placement of this model on these servers.
    """
    layout = server.experts.layout
    _, layers, experts = layout.device_of.shape
    by_name = {each.name: each.resident for each in servers}
    try:
        seated = server.info.seated.values()
        if len(servers) != len(by_name) or set(by_name) != set(seated):
            raise UserError(f"servers: list each of {', '.join(seated)} exactly once")
        resident = [by_name[name] if name else [[]] * layers for name in server.info.servers]
        if {len(each) for each in resident} != {layers}:
            raise UserError(f"resident: give one list for each of the {layers} MoE layers")
        placement = Placement.of_lists(resident, experts)
        placement.validate(layout.capacities, server.info.servers, layout.holders)
    except UserError as error:
        raise ApiError(400, str(error), param="servers") from error
    return resident
