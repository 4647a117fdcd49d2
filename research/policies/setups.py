"""Which server serves which topics, on how many devices, in how much memory."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from dance_jax.placement.cost import CallCost

from .published import COUNTS, REFERENCE, Figures
from .traces import CountsAlone, Trace, count

#: Devices of the servers, in turn.
PATTERN = (1, 1, 2)
#: Expert slots of all servers together, in copies of the model.
MEMORY = 1.32
MEMORIES = (1.05, 1.32, 1.7, 2.5)
SERVERS = (4, 8, 16)
#: Servers and their memory, in copies of the model, where every expert has several holders, and the
#: numbers of losses to survive.
SURVIVING = ((3, 2.5), (4, 3.6))
LOSSES = (0, 1, 2)


def devices_of(servers: int) -> tuple[int, ...]:
    """Devices of each server: PATTERN, repeated as often as needed."""
    return tuple(itertools.islice(itertools.cycle(PATTERN), servers))


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """The inputs of policies, and the tokens on which their placements are measured."""

    title: str
    #: float64 [servers, layers, experts]: calls that policies see; those of a server sum to 1.
    counts: np.ndarray
    #: Devices of each server; its memory is in proportion.
    devices: tuple[int, ...]
    #: Memory of all servers together, in copies of the model.
    memory: float = MEMORY
    #: Per server int [tokens, layers, k]: tokens that policies see; None if only counts are known.
    fit: tuple[np.ndarray, ...] | None = None
    #: Tokens that no policy sees.
    test: tuple[np.ndarray, ...] | None = None
    #: Published figures, by policy.
    published: Mapping[str, Figures] = dataclasses.field(default_factory=dict)
    #: Servers that may be lost: every expert has one holder more than that.
    survive: int = 0

    @functools.cached_property
    def capacities(self) -> list[int]:
        """Expert slots of each server."""
        return slots(self.counts[0].size, self.memory, self.devices)

    @property
    def cost(self) -> CallCost | None:
        return None if self.fit is None else CallCost.reference(self.devices, self.fit[0].shape[2])

    def describe(self) -> str:
        """The sizes in words."""
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
    """The numbers of a few servers; the repeated pattern of many."""
    shown = [*map(str, numbers[: len(PATTERN)]), "..."] if len(numbers) > 4 else map(str, numbers)
    return ", ".join(shown)


def slots(total: int, memory: float, devices: Sequence[int]) -> list[int]:
    """Capacities of servers with equal devices, in whole slots; in all at least one copy.

    Args:
        total: number of experts of the model.
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
    """Counts of which those of each server sum to 1, so that all servers weigh the same."""
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
    """A server's tokens: the first half of each topic, which policies see, and the second half."""
    fit, test = [], []
    for part in workload:
        route = trace.routes[part.topic]
        half = len(route) // 2
        fit.append(route[:half][part.first :: part.step])
        test.append(route[half:][part.first :: part.step])
    return np.concatenate(fit), np.concatenate(test)


def deal(trace: Trace, servers: int) -> list[list[Part]]:
    """Deals topics, sorted by name, to servers in turn; every token goes to exactly one server.

    If there are fewer topics than servers, those with most tokens are cut into parts.
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
    """A setup with a server for each workload."""
    pairs = [halves(trace, workload) for workload in workloads]
    fit, test = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
    counts = normalised(np.stack([count(route, trace.experts) for route in fit]))
    return Setup(title, counts, devices_of(len(workloads)), memory, fit, test, published or {})


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


def surviving(trace: Trace, losses: Sequence[int]) -> list[Setup]:
    """Few servers in which every expert has holders for so many losses, where memory suffices."""
    found = []
    for servers, memory in SURVIVING:
        workloads = _three(trace) if servers == 3 else deal(trace, servers)
        for survive in losses:
            title = f"{trace.name}, {servers} servers, {memory:g} x the model, survive {survive}"
            setup = workload_setup(trace, title, workloads, memory)
            total = setup.counts[0].size
            usable = sum(min(slots, total) for slots in setup.capacities)
            if usable >= (survive + 1) * total:
                found.append(dataclasses.replace(setup, survive=survive))
    return found


def counts_alone(trace: Trace, models: Sequence[CountsAlone]) -> list[Setup]:
    """Setups without routes: the topics `alone` of the trace, and other models."""
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
