"""The cost of a layer on these servers: rates and round trips of links and times of experts, given
in the hosts file or measured."""

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

#: Bits per second of links, and seconds of a round trip, if none is known but seconds are needed.
DEFAULT_RATE, DEFAULT_ROUND_TRIP = 1e9, 2e-4
#: Seconds that both servers together take for a call, besides the network's round trip, the bytes
#: and the experts.
CALL_S = 2e-4

#: The share for `LockStepCost.staggered` of a service that has had no requests yet: about what
#: research/paper.py measures with random arrivals. In a batch all servers have tokens most of the
#: time.
SERVICE_STAGGERED = 0.7


@dataclasses.dataclass(frozen=True)
class MeasuredCosts:
    """What a running server has measured; None where nothing is certain."""

    #: Seconds that a byte takes through its links in one direction.
    byte_s: float | None = None
    #: Seconds of one expert call on one of its devices.
    call_s: float | None = None
    #: Seconds of a call to another server and its answer, without their bytes and the computation;
    #: mean over calls.
    round_s: float | None = None


@dataclasses.dataclass(frozen=True)
class ServerLoad:
    """The recent load of all servers.

    Attributes:
        rows: as in `CallCost`; empty if not known.
        busy: fraction of the time in which the mean device computed experts; None if not known.
        busiest: share of hidden states that went through the busiest link of each layer; None if
            not known.
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

    Measured times of expert calls, round trips of calls and rows of steps replace what was given or
    assumed. Measured rates only fill in for links without one: a server measures the slowest of the
    links between itself and others, so unequal links are better given, or measured by the
    preflight. If no rate is known at all, links count as DEFAULT_RATE.
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
    # Engines keep the order of calls that they got at their start.
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
    """The cost of the servers in the exchange in use, for policies that predict time.

    A hidden state and the sum that comes back occupy a link for their bytes / bandwidth. A link of
    unknown rate counts as the fastest known one. Unknown round trips and expert times count as the
    mean of the known ones. Without any rate or round trip all links and devices are equal
    (`Cost.reference`); without any expert time calls have the weight of `Cost.of_links`.

    Args:
        spec, model, config: of the cluster.
        service: users send requests at random times; otherwise there is a batch.
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
    """A note on what `cluster_cost` lacks although the hosts file asks for it; None if nothing."""
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
    """Bytes of one hidden state to another server and of its sum back."""
    total = jax.ShapeDtypeStruct((1, width), jnp.dtype(jnp.float32))
    encoded = functools.partial(encode, dtype=jnp.dtype(config.wire_dtype))
    return row_bytes(jax.eval_shape(encoded, total)) + total.size * total.dtype.itemsize


def _filled(
    values: Iterable[float | None], instead: Callable[[list[float]], float]
) -> np.ndarray | None:
    """The values, unknown ones as `instead` of the known ones: float [n]; None if none is known."""
    all_values = list(values)
    known = [value for value in all_values if value is not None]
    if not known:
        return None
    return np.array([instead(known) if value is None else value for value in all_values])
