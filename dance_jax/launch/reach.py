"""Before servers elsewhere start: the preflight, and what it tells about reaching them."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable

from dance_jax.launch.cluster import Network
from dance_jax.launch.node import Nodes
from dance_jax.launch.plan import Plan
from dance_jax.launch.preflight.asker import Asker, CallAsker, ProbeAsker
from dance_jax.launch.preflight.run import Preflight, run_preflight


def needs_preflight(plan: Plan, nodes: Nodes | None) -> bool:
    """Some server is on another machine, where much can be wrong that nobody sees here."""
    return nodes is not None or any(server.ssh for server in plan.spec.servers)


def survey(
    plan: Plan,
    network: Network,
    nodes: Nodes | None,
    *,
    model: pathlib.Path | None,
    fingerprint: str,
    cache_dir: pathlib.Path | None,
    platform: str,
    measure_all: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Preflight:
    """`run_preflight` for a plan's servers.

    Args:
        plan: says how much each device will hold.
        nodes: launchers to ask; None: every server is asked over ssh, or here.
        model, fingerprint, cache_dir, platform, measure_all, progress: as for `run_preflight`.
    """
    askers = None if nodes is None else _askers(plan, network, nodes)
    try:
        return run_preflight(
            plan.spec,
            model=model,
            fingerprint=fingerprint,
            cache_dir=cache_dir,
            platform=platform,
            needs=[s.trunk_bytes + s.kv_bytes + s.pool_bytes for s in plan.servers],
            coordinator_port=network.coordinator_port,
            ssh_config=network.ssh_config,
            measure_all=measure_all,
            askers=askers,
            progress=progress,
        )
    finally:
        for asker in askers or ():
            asker.close()


def _askers(plan: Plan, network: Network, nodes: Nodes) -> list[Asker]:
    others = (CallAsker(functools.partial(nodes.ask, rank)) for rank in nodes.servers)
    return [ProbeAsker(plan.spec.servers[0], network.ssh_config), *others]


def checked(plan: Plan, network: Network, found: Preflight) -> tuple[Plan, Network]:
    """Plan and network with what the preflight has found: rates, and this machine's addresses.

    Raises:
        UserError: a launch would fail; with all reasons.
    """
    found.check()
    if not network.control_addresses:
        seen = [address for address in found.client_addresses if address is not None]
        network = dataclasses.replace(network, control_addresses=tuple(dict.fromkeys(seen)))
    return dataclasses.replace(plan, spec=found.spec), network
