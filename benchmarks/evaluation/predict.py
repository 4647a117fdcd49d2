"""What the simulator says of runs that were measured, with speeds that were measured in them."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from benchmarks.live.tasks import Plan
from benchmarks.live.watch import Sample, Watched
from benchmarks.simulation.fit import Fitted, fit
from dance_jax.config import EngineConfig
from dance_jax.placement import Activations
from dance_jax.placement.simulate import Model, Requests, Scenario, Work, simulate

from .workloads import Placed

#: Of a link's rate, what is left for rows beside headers of packets.
PAYLOAD = 0.95


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """A run, and all that the simulator has to know of it.

    Attributes:
        rate: bits a second of every link; None: not shaped.
        placed: in force.
        plan: what was asked.
        activations: of the workload.
        work: of each server, in windows.
    """

    rate: int | None
    placed: Placed
    plan: Plan
    activations: Activations
    work: tuple[tuple[Work, ...], ...]


def work_of(run: Watched, layers: int) -> tuple[tuple[Work, ...], ...]:
    """What each server did in a run, from one sample to the next: windows of different kinds.

    Args:
        layers: MoE layers of the model.
    """
    servers = range(len(run.samples[0].steps))
    return tuple(
        tuple(_between(*pair, server, layers) for pair in itertools.pairwise(run.samples))
        for server in servers
    )


def _between(first: Sample, last: Sample, server: int, layers: int) -> Work:
    """What a server did between two samples."""

    def spent(values: str) -> float:
        return getattr(last, values)[server] - getattr(first, values)[server]

    def part(*names: str) -> float:
        return sum(last.seconds[name][server] - first.seconds[name][server] for name in names)

    buckets: collections.Counter[tuple[int, int]] = collections.Counter()
    for name, steps in last.bucket_steps.items():
        rows, _, more = name.partition("+")
        before = first.bucket_steps.get(name, [0.0] * len(steps))
        buckets[int(rows), int(more)] = round(steps[server] - before[server])
    return Work(
        steps=round(spent("steps")),
        buckets=+buckets,
        calls=round(spent("served")),
        rounds=round(2 * layers * spent("steps")),
        bytes=round(spent("sent")),
        step_s=part("schedule", "output"),
        trunk_s=part("compute"),
        exchange_s=part("exchange"),
        experts_s=part("experts"),
    )


def speeds(runs: Sequence[Measured], block_size: int) -> list[Fitted]:
    """Of each server, from all runs.

    Raises:
        UserError: they are too few, or too much alike.
    """
    servers = range(len(runs[0].work))
    return [
        fit([window for run in runs for window in run.work[server]], block_size)
        for server in servers
    ]


def predicted(
    run: Measured, fitted: Sequence[Fitted], devices: Sequence[int], slots: int, model: Model,
    config: EngineConfig,
) -> float:  # fmt: skip
    """Mean latency in seconds.

    Args:
        fitted: of each server.
        slots: of each device.
    """
    rate = np.inf if run.rate is None else PAYLOAD * run.rate
    servers = tuple(
        dataclasses.replace(one.server(count, slots), bandwidth=rate)
        for one, count in zip(fitted, devices, strict=True)
    )
    calls = run.plan.calls
    requests = Requests(
        at=np.array([call.arrival_s for call in calls]),
        server=np.array([call.server for call in calls]),
        prompt=np.array([len(call.prompt) for call in calls]),
        output=np.array([call.max_tokens for call in calls]),
    )
    scenario = Scenario(
        servers,
        model,
        config,
        run.placed.placement,
        run.activations.routes,
        requests,
        counts=run.activations.counts,
    )
    return simulate(scenario).latency.mean
