"""Check the servers of a launch with a preflight and apply its results."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence

from dance_jax.config import ClusterSpec
from dance_jax.launch.agent.network import Network
from dance_jax.launch.agent.node import Nodes
from dance_jax.launch.planning.plan import Room
from dance_jax.launch.preflight.asker import Asker, CallAsker, ProbeAsker
from dance_jax.launch.preflight.run import Preflight, run_preflight


def needs_preflight(spec: ClusterSpec, nodes: Nodes | None) -> bool:
    """Whether a server is on another machine, where problems are invisible from here."""
    return nodes is not None or any(server.ssh for server in spec.servers)


def survey(
    spec: ClusterSpec,
    held: Sequence[Room],
    network: Network,
    nodes: Nodes | None,
    *,
    model: str | os.PathLike[str] | None,
    fingerprint: str,
    cache_dir: pathlib.Path | None,
    measure_all: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Preflight:
    """Run a preflight for the servers of a launch.

    Args:
        spec: the servers.
        held: what each server will hold.
        network: how the servers are reached.
        nodes: launchers to ask; None: every server is asked over ssh, or on this machine.
        model, fingerprint, cache_dir, measure_all, progress: as for `run_preflight`.
    """
    askers = None if nodes is None else _askers(spec, network, nodes)
    try:
        return run_preflight(
            spec,
            model=model,
            fingerprint=fingerprint,
            cache_dir=cache_dir,
            needs=[room.device_bytes for room in held],
            coordinator_port=network.coordinator_port,
            ssh_config=network.ssh_config,
            measure_all=measure_all,
            askers=askers,
            progress=progress,
        )
    finally:
        for asker in askers or ():
            asker.close()


def _askers(spec: ClusterSpec, network: Network, nodes: Nodes) -> list[Asker]:
    others = (CallAsker(functools.partial(nodes.ask, rank)) for rank in nodes.servers)
    return [ProbeAsker(spec.servers[0], network.ssh_config), *others]


def checked(network: Network, found: Preflight) -> tuple[ClusterSpec, Network]:
    """Apply the preflight's results: measured rates, and this machine's addresses.

    Raises:
        UserError: a launch would fail; the message has all reasons.
    """
    found.check()
    if not network.control_addresses:
        seen = [address for address in found.client_addresses if address is not None]
        network = dataclasses.replace(network, control_addresses=tuple(dict.fromkeys(seen)))
    return found.spec, network
