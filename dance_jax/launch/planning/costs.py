"""What a layer costs on these servers: the rates of their links and the times of their experts, as
they are given, or measured while the servers run."""

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
from dance_jax.models.messages import encode, row_bytes
from dance_jax.placement.cost import CallCost, Cost, LockStepCost, of_pairs

#: Where nothing is known of any link, and seconds count: bits a second, and seconds to another
#: server and back.
DEFAULT_RATE, DEFAULT_ROUND_TRIP = 1e9, 2e-4
#: Seconds of a call beside the network's round trip, its bytes and its experts: both servers' own.
CALL_S = 2e-4

#: `LockStepCost.staggered` of a service whose users have asked for nothing yet: about what
#: research/paper.py measures of servers that are asked at random. In a batch all have tokens most
#: of the time.
SERVICE_STAGGERED = 0.7


@dataclasses.dataclass(frozen=True)
class MeasuredCosts:
    """What a server has found out while it ran; None: nothing certain."""

    #: Seconds that a byte takes through its links in one direction.
    byte_s: float | None = None
    #: Seconds of one expert call on one of its devices.
    call_s: float | None = None
    #: Seconds of a call to another server and its answer, the mean of those servers, without bytes
    #: and what is computed there.
    round_s: float | None = None


@dataclasses.dataclass(frozen=True)
class ServerLoad:
    """How servers were used of late.

    Attributes:
        rows: as in `CallCost`; empty: not known.
        busy: part of the time in which the mean device computed experts; None: not known.
        busiest: of hidden states, those through the busiest link of each layer; None: not known.
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
    """`cluster_cost` of servers that run, in seconds: with what is measured of expert calls, of
    links whose rate or round trip is not given, and of steps.

    What a server measures of its link is the slowest link of those it exchanges with, so that
    unequal links are better given, or measured by the preflight. Where no rate is known at all,
    links count as DEFAULT_RATE.
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
    # Engines call in the order that they were told when they began.
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
    """What policies that predict time know of the servers, in the exchange in use.

    A hidden state and the sum that comes back take their bytes / bandwidth of a link. A link of
    unknown rate counts as the fastest that is known, one of unknown round trip as the mean of those
    known, a device of unknown expert time as the mean of the known. Without any rate or round trip
    all links and devices are equal (`Cost.reference`); without any expert time calls have the
    weight of `Cost.of_links`.

    Args:
        service: its users ask when they like, where nothing else is known.
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
    """What `cluster_cost` does without although it was asked for; None: nothing."""
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
        return f"{why}: taken for the fastest that is known."
    without = ", and expert_time= says nothing" if times else ""
    return f"{why}: all links count the same{without}."


def exchanged_bytes(width: int, config: EngineConfig) -> int:
    """Bytes of one hidden state to another server, and of its sum back."""
    total = jax.ShapeDtypeStruct((1, width), jnp.dtype(jnp.float32))
    encoded = functools.partial(encode, dtype=jnp.dtype(config.wire_dtype))
    return row_bytes(jax.eval_shape(encoded, total)) + total.size * total.dtype.itemsize


def _filled(
    values: Iterable[float | None], instead: Callable[[list[float]], float]
) -> np.ndarray | None:
    """Float [n], with `instead` of the known values for unknown ones; None: none is known."""
    all_values = list(values)
    known = [value for value in all_values if value is not None]
    if not known:
        return None
    return np.array([instead(known) if value is None else value for value in all_values])
