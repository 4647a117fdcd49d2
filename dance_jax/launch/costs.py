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
from dance_jax.placement import visit
from dance_jax.placement.cost import Cost

#: Bits a second of every link where nothing is known of any, and seconds count.
DEFAULT_RATE = 1e9

#: `Cost.apart` of a service whose users have asked for nothing yet: about what benchmarks/paper.py
#: measures of servers that are asked at random. In a batch all have tokens most of the time.
SERVICE_APART = 0.7


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a server has found out while it ran; None: nothing certain."""

    #: Seconds that a byte takes through its links in one direction.
    byte_s: float | None = None
    #: Seconds of one expert call on one of its devices.
    call_s: float | None = None


def running_cost(
    spec: ClusterSpec, model: ModelConfig, config: EngineConfig, measured: Sequence[Measured]
) -> Cost:
    """`cluster_cost` of servers that run, in seconds: with what is measured of expert calls, and of
    links whose rate is not given.

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
    return cluster_cost(ClusterSpec(servers), model, config)


def cluster_cost(spec: ClusterSpec, model: ModelConfig, config: EngineConfig) -> Cost:
    """What policies that predict time know of the servers.

    A hidden state and the sum that comes back take their bytes / bandwidth of a link. A link of
    unknown rate counts as the fastest that is known, a device of unknown expert time as the mean of
    the known. Without any rate all links and devices are equal (`Cost.reference`); without any
    time calls have the weight of `Cost.of_links`.
    """
    rate_n = _filled((server.bandwidth for server in spec.servers), max)
    if rate_n is None:
        return Cost.reference(spec.devices, model.top_k)
    state_n = 8 * exchanged_bytes(model.hidden_size, config) / rate_n
    cost = Cost.of_links(state_n, spec.devices, model.top_k)
    call_n = _filled((server.expert_time for server in spec.servers), statistics.fmean)
    return cost if call_n is None else dataclasses.replace(cost, call=call_n)


def preferences(spec: ClusterSpec, model: ModelConfig, config: EngineConfig) -> np.ndarray:
    """The order in which each server prefers to call the others: int32 [n, n], see
    `visit.preferences`."""
    cost = cluster_cost(spec, model, config)
    return visit.preferences(np.maximum(cost.state[:, None], cost.state[None, :]) + cost.call)


def cost_note(spec: ClusterSpec) -> str | None:
    """What `cluster_cost` does without although it was asked for; None: nothing."""
    unmeasured = [s.name for s in spec.servers if s.measure_bandwidth and s.bandwidth is None]
    rates = any(server.bandwidth is not None for server in spec.servers)
    times = any(server.expert_time is not None for server in spec.servers)
    if unmeasured:
        why = f"bandwidth=auto of {', '.join(unmeasured)} is not measured"
    elif times and not rates:
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
