"""What the simulator says of runs that were measured, with speeds that were measured in them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from benchmarks.live.tasks import Plan
from benchmarks.live.watch import Watched
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
        work: of each server.
    """

    rate: int | None
    placed: Placed
    plan: Plan
    activations: Activations
    work: tuple[Work, ...]


def work_of(run: Watched, layers: int) -> tuple[Work, ...]:
    """What each server did in a run.

    Args:
        layers: MoE layers of the model.
    """
    first, last = run.samples[0], run.samples[-1]

    def spent(values: str, server: int) -> float:
        return getattr(last, values)[server] - getattr(first, values)[server]

    def part(server: int, *names: str) -> float:
        return sum(last.seconds[name][server] - first.seconds[name][server] for name in names)

    def buckets(server: int) -> collections.Counter[tuple[int, int]]:
        found: collections.Counter[tuple[int, int]] = collections.Counter()
        for name, steps in last.bucket_steps.items():
            before = first.bucket_steps.get(name, [0.0] * len(steps))
            rows, _, more = name.partition("+")
            found[int(rows), int(more)] = round(steps[server] - before[server])
        return +found

    return tuple(
        Work(
            steps=round(spent("steps", server)),
            buckets=buckets(server),
            calls=round(spent("served", server)),
            rounds=round(2 * layers * spent("steps", server)),
            bytes=round(spent("sent", server)),
            step_s=part(server, "schedule", "output"),
            trunk_s=part(server, "compute"),
            exchange_s=part(server, "exchange"),
            experts_s=part(server, "experts"),
        )
        for server in range(len(last.steps))
    )


def speeds(runs: Sequence[Measured], block_size: int) -> list[Fitted]:
    """Of each server, from all runs."""
    servers = range(len(runs[0].work))
    return [fit([run.work[server] for run in runs], block_size) for server in servers]


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
