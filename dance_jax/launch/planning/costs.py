"""Cost of a layer on the servers: link rates and expert times, given or measured in service."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dance_jax.config import ClusterSpec, EngineConfig
from dance_jax.models.config import ModelConfig
from dance_jax.models.lock_step_messages import encode, row_bytes
from dance_jax.placement.cost import CallCost, Cost, LockStepCost, of_pairs

#: Rate (bits per second) and round trip (seconds) of links when none is known but costs are in
#: seconds.
DEFAULT_RATE, DEFAULT_ROUND_TRIP = 1e9, 2e-4
#: Seconds of a call besides the network's round trip, its bytes and its experts: on both servers.
CALL_S = 2e-4

#: `LockStepCost.staggered` of a service without requests so far: about what research/paper.py
#: measures for servers with requests at random times. In a batch, all servers have tokens most of
#: the time.
SERVICE_STAGGERED = 0.7


@dataclasses.dataclass(frozen=True)
class MeasuredCosts:
    """What a server has measured while it ran; None: nothing reliable."""

    #: Seconds per byte on the server's links in one direction.
    byte_s: float | None = None
    #: Seconds of one expert call on one of the server's devices.
    call_s: float | None = None
    #: Seconds of a call to another server and its answer, mean over those servers, without the
    #: bytes and the computation there.
    round_s: float | None = None


@dataclasses.dataclass(frozen=True)
class ServerLoad:
    """Recent load of the servers.

    Attributes:
        rows: as in `CallCost`; empty: unknown.
        busy: fraction of the time in which the mean device computed experts; None: unknown.
        busiest: fraction of the hidden states that went through the busiest link of their layer;
            None: unknown.
    """

    rows: tuple[tuple[float, float], ...] = ()
    busy: float | None = None
    busiest: float | None = None


def running_cost(
    spec: ClusterSpec,
    model: ModelConfig,
    config: EngineConfig,
    measured: Sequence[MeasuredCosts],
    load: ServerLoad,
) -> Cost:
    """`cluster_cost` of running servers, in seconds.

    Measured expert times, round trips of calls and rows per step replace what was given or assumed.
    Measured rates only fill in for links without a rate: a server measures the slowest of the links
    it exchanges over, so unequal links should be given, or measured by the preflight. If no rate is
    known at all, links count as DEFAULT_RATE.
    """
    servers = tuple(
        dataclasses.replace(
            server,
            bandwidth=server.bandwidth or (None if found.byte_s is None else 8 / found.byte_s),
            expert_time=server.expert_time if found.call_s is None else found.call_s,
        )
        for server, found in zip(spec.servers, measured, strict=True)
    )
    if all(server.bandwidth is None for server in servers):
        servers = tuple(dataclasses.replace(each, bandwidth=DEFAULT_RATE) for each in servers)
    cost = cluster_cost(ClusterSpec(servers), model, config)
    # The calling order of the engines was fixed when they started.
    cost = dataclasses.replace(cost, order=cluster_cost(spec, model, config).preferences())
    if not isinstance(cost, CallCost):
        return cost
    round_n = _filled((each.round_s for each in measured), statistics.fmean)
    return dataclasses.replace(
        cost,
        round=cost.round if round_n is None else of_pairs(round_n),
        rows=load.rows or cost.rows,
        busy=cost.busy if load.busy is None else load.busy,
    )


def cluster_cost(
    spec: ClusterSpec, model: ModelConfig, config: EngineConfig, *, service: bool = False
) -> Cost:
    """Cost model of the servers for placement policies, for the exchange in use.

    A hidden state and the sum that comes back take their bytes / bandwidth of a link. An unknown
    rate counts as the fastest known one; an unknown round trip or expert time as the mean of the
    known ones. Without any rate or round trip, all links and devices are equal
    (`Cost.reference`); without any expert time, calls have the weight of `Cost.of_links`.

    Args:
        service: requests arrive at independent times; matters for LockStepCost only.
    """
    form = LockStepCost if config.exchange == "collectives" else CallCost
    rate_n = _filled((server.bandwidth for server in spec.servers), max)
    trip_n = _filled((server.round_trip for server in spec.servers), statistics.fmean)
    if rate_n is None and trip_n is None:
        cost = form.reference(spec.devices, model.top_k)
    else:
        if rate_n is None:
            rate_n = np.full(len(spec.servers), DEFAULT_RATE)
        if trip_n is None:
            trip_n = np.full(len(spec.servers), DEFAULT_ROUND_TRIP)
        state_n = 8 * exchanged_bytes(model.hidden_size, config) / rate_n
        cost = form.of_links(state_n, spec.devices, model.top_k)
        call_n = _filled((server.expert_time for server in spec.servers), statistics.fmean)
        if call_n is not None:
            cost = dataclasses.replace(cost, call=call_n)
        if isinstance(cost, CallCost):
            cost = dataclasses.replace(cost, round=(trip_n + CALL_S) / 2)
    if service and isinstance(cost, LockStepCost):
        return cost.staggered(SERVICE_STAGGERED)
    return cost


def cost_note(spec: ClusterSpec) -> str | None:
    """A note on information that `cluster_cost` should use but lacks; None if it is complete."""
    unmeasured = [s.name for s in spec.servers if s.measure_bandwidth and s.bandwidth is None]
    rates = any(server.bandwidth is not None for server in spec.servers)
    times = any(server.expert_time is not None for server in spec.servers)
    if unmeasured:
        why = f"bandwidth=auto of {', '.join(unmeasured)} is not measured"
    elif times and not rates and all(server.round_trip is None for server in spec.servers):
        why = "no link's rate is known"
    else:
        return None
    if rates:
        return f"{why}: it counts as the fastest known rate."
    trips = any(server.round_trip is not None for server in spec.servers)
    without = ", and expert_time= has no effect" if times and not trips else ""
    return f"{why}: all links count the same{without}."


def exchanged_bytes(width: int, config: EngineConfig) -> int:
    """Bytes of one hidden state to another server plus its sum back."""
    total = jax.ShapeDtypeStruct((1, width), jnp.dtype(jnp.float32))
    encoded = functools.partial(encode, dtype=jnp.dtype(config.wire_dtype))
    return row_bytes(jax.eval_shape(encoded, total)) + total.size * total.dtype.itemsize


def _filled(
    values: Iterable[float | None], instead: Callable[[list[float]], float]
) -> np.ndarray | None:
    """Float [n] with unknown values replaced by `instead(known values)`; None if none is known."""
    all_values = list(values)
    known = [value for value in all_values if value is not None]
    if not known:
        return None
    return np.array([instead(known) if value is None else value for value in all_values])
