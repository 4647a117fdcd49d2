"""Who serves what, on how many devices, in how much memory."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from dance_jax.placement import CallCost

from .published import COUNTS, REFERENCE, Figures
from .traces import CountsAlone, Trace, count

#: Devices of the servers, repeated as often as needed.
PATTERN = (1, 1, 2)
#: Expert slots of all servers together, in copies of the model.
MEMORY = 1.32
MEMORIES = (1.05, 1.32, 1.7, 2.5)
SERVERS = (4, 8, 16)


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What policies are given, and the tokens on which their placements are measured."""

    title: str
    #: float64 [servers, layers, experts]: calls that policies see, of each server in all 1.
    counts: np.ndarray
    #: Devices of each server; its memory is in proportion.
    devices: tuple[int, ...]
    #: In copies of the model.
    memory: float = MEMORY
    #: Of each server, int [tokens, layers, k]: tokens that policies see; None: only counts.
    fit: tuple[np.ndarray, ...] | None = None
    #: Tokens that no policy sees.
    test: tuple[np.ndarray, ...] | None = None
    #: Published figures, by policy.
    published: Mapping[str, Figures] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def capacities(self) -> list[int]:
        """Expert slots of each server."""
        return slots(self.counts[0].size, self.memory, self.devices)

    @property
    def cost(self) -> CallCost | None:
        return None if self.fit is None else CallCost.reference(self.devices, self.fit[0].shape[2])

    def describe(self) -> str:
        """Sizes, in words."""
        servers, layers, experts = self.counts.shape
        tokens = ""
        if self.fit is not None and self.test is not None:
            tokens = (
                f", {sum(map(len, self.fit)):,} tokens seen and {sum(map(len, self.test)):,} not"
            )
        return (
            f"{layers} layers x {experts} experts, {servers} servers with {_list(self.devices)} "
            f"devices and {_list(self.capacities)} slots ({self.memory:g} x the model){tokens}"
        )


def _list(numbers: Sequence[int]) -> str:
    """All of a few; of more servers the pattern that they repeat."""
    shown = [*map(str, numbers[: len(PATTERN)]), "..."] if len(numbers) > 4 else map(str, numbers)
    return ", ".join(shown)


def slots(total: int, memory: float, devices: Sequence[int]) -> list[int]:
    """Capacities of servers whose devices are all equal: whole slots, one copy at least in all.

    Args:
        total: experts of the model.
        memory: of all servers, in copies of the model, at least 1.
        devices: of each server.
    """
    shares = [memory * total * each / sum(devices) for each in devices]
    whole = [int(share) for share in shares]
    by_rest = sorted(range(len(devices)), key=lambda n: whole[n] - shares[n])
    for n in by_rest[: max(total - sum(whole), 0)]:
        whole[n] += 1
    return whole


def normalised(counts: np.ndarray) -> np.ndarray:
    """Every server weighs the same."""
    return counts / counts.sum((1, 2), keepdims=True)


@dataclasses.dataclass(frozen=True)
class Part:
    """Every `step`-th token of a topic, from the one at `first` on."""

    topic: str
    first: int = 0
    step: int = 1

    def __str__(self) -> str:
        return self.topic if self.step == 1 else f"{self.topic} {self.first + 1}/{self.step}"


Workload = Sequence[Part]


def halves(trace: Trace, workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a server that are seen, the first half of each topic, and those that are not."""
    fit, test = [], []
    for part in workload:
        route = trace.routes[part.topic]
        half = len(route) // 2
        fit.append(route[:half][part.first :: part.step])
        test.append(route[half:][part.first :: part.step])
    return np.concatenate(fit), np.concatenate(test)


def deal(trace: Trace, servers: int) -> list[list[Part]]:
    """Topics in turn, by name, to that many servers: every token to exactly one of them.

    Where there are fewer topics than servers, those with most tokens are cut in several parts.
    """
    cuts = dict.fromkeys(sorted(trace.routes), 1)
    while sum(cuts.values()) < servers:
        cuts[max(cuts, key=lambda topic: len(trace.routes[topic]) / cuts[topic])] += 1
    parts = [Part(topic, n, step) for topic, step in cuts.items() for n in range(step)]
    return [parts[n::servers] for n in range(servers)]


def workload_setup(
    trace: Trace,
    title: str,
    workloads: Sequence[Workload],
    memory: float = MEMORY,
    published: Mapping[str, Figures] | None = None,
) -> Setup:
    """A server for each workload."""
    pairs = [halves(trace, workload) for workload in workloads]
    fit, test = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
    counts = normalised(np.stack([count(route, trace.experts) for route in fit]))
    devices = tuple(itertools.islice(itertools.cycle(PATTERN), len(workloads)))
    return Setup(title, counts, devices, memory, fit, test, published or {})


def _three(trace: Trace) -> list[list[Part]]:
    return [[Part(topic) for topic in topics] for topics in trace.workloads]


def reference(trace: Trace) -> Setup:
    published = REFERENCE if trace.published else None
    return workload_setup(trace, trace.name, _three(trace), MEMORY, published)


def memories(trace: Trace) -> list[Setup]:
    """`reference` with less and more memory."""
    return [
        workload_setup(
            trace,
            f"{trace.name}, memory {memory:g} x the model",
            _three(trace),
            memory,
            REFERENCE if trace.published and memory == MEMORY else None,
        )
        for memory in MEMORIES
    ]


def more_servers(trace: Trace) -> list[Setup]:
    return [
        workload_setup(trace, f"{trace.name}, {servers} servers", deal(trace, servers))
        for servers in SERVERS
    ]


def counts_alone(trace: Trace, models: Sequence[CountsAlone]) -> list[Setup]:
    """The trace's topics `alone`, and other models."""
    setups = [
        Setup(
            f"{trace.name}, counts alone: {' | '.join(trace.alone)}",
            normalised(np.stack([trace.counts[topic] for topic in trace.alone])),
            PATTERN,
            published=COUNTS if trace.published else {},
        )
    ]
    for model in models:
        title = f"{model.name}, counts alone: {' | '.join(model.domains)}"
        setups.append(Setup(title, normalised(model.counts), PATTERN))
    return setups
