"""What the simulator says of runs that were measured, with speeds that were measured in them.

What a server computes costs what its engine's clock counted (`simulation.fit`). What a round costs
besides its bytes, and how much of a link's rate there is for them, no clock tells: seconds in which
a server moves bytes are also seconds in which it waits for others to send them, phases overlap, and
who is woken has to find a core. So those two are the ones with which steps of the *other* policies
take as long as they took: a policy's own runs have no part in its prediction but for computing.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.live.tasks import Plan
from benchmarks.live.watch import Sample, Watched
from benchmarks.simulation.fit import Fitted, fit
from dance_jax.config import EngineConfig
from dance_jax.placement import Activations
from dance_jax.placement.simulate import Model, Requests, Scenario, Work, simulate

from .workloads import Placed

#: Seconds of a round, and shares of a link's rate, that are tried. 0.95 is left beside headers of
#: packets; more than 1, where what the simulator does one after the other overlaps.
ROUNDS_S = (0.0, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4)
SHARES = (0.85, 0.95, 1.05, 1.15, 1.25)


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """A run, and all that the simulator has to know of it.

    Attributes:
        rate: bits a second of every link; None: not shaped.
        placed: in force.
        plan: what was asked.
        outputs: tokens of each answer, in the order of the plan's calls.
        activations: of the workload.
        work: of each server, in windows.
        cpu_s: processor seconds of each server's engine.
        step_s: seconds of a step, in the mean; 0: there was none.
    """

    rate: int | None
    placed: Placed
    plan: Plan
    outputs: tuple[int, ...]
    activations: Activations
    work: tuple[tuple[Work, ...], ...]
    cpu_s: tuple[float, ...]
    step_s: float


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


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What the simulator says of a run; seconds, means.

    Attributes:
        computing_s: of a step, by server, stops included.
    """

    latency_s: float
    step_s: float
    computing_s: tuple[float, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Machine:
    """All that runs have in common.

    Attributes:
        fitted: of each server.
        devices: of each server.
        slots: of each device, spare ones left out.
    """

    fitted: Sequence[Fitted]
    devices: Sequence[int]
    slots: int
    model: Model
    config: EngineConfig

    def predict(self, run: Measured, round_s: float, share: float) -> Predicted:
        """What comes of a run; see `scenario`."""
        result = simulate(self.scenario(run, round_s, share))
        in_steps = result.compute_seconds[0] + result.communicate_seconds[0]
        return Predicted(
            result.latency.mean,
            float(in_steps / result.steps[0]),
            tuple(work.computing_s / work.steps for work in result.work),
        )

    def scenario(self, run: Measured, round_s: float, share: float) -> Scenario:
        """A run, as the simulator wants it.

        Args:
            round_s: seconds that a round costs besides its bytes.
            share: of a link's rate, that there is for payload.
        """
        rate = np.inf if run.rate is None else share * run.rate
        servers = [
            one.server(count, self.slots)
            for one, count in zip(self.fitted, self.devices, strict=True)
        ]
        calls = run.plan.calls
        return Scenario(
            tuple(
                dataclasses.replace(
                    server,
                    speed=dataclasses.replace(server.speed, round=round_s),
                    bandwidth=rate,
                )
                for server in servers
            ),
            self.model,
            self.config,
            run.placed.placement,
            run.activations.routes,
            Requests(
                at=np.array([call.arrival_s for call in calls]),
                server=np.array([call.server for call in calls]),
                prompt=np.array([len(call.prompt) for call in calls]),
                output=np.maximum(run.outputs, 1),
            ),
            counts=run.activations.counts,
        )


def predictions(
    machine: Machine, runs: Sequence[Measured], done: Callable[[], object] = lambda: None
) -> list[float]:
    """Mean latency of each run, in seconds; those at one rate share a link.

    What a round costs and what a link carries are chosen from runs of other policies at the same
    rate; of the same one, where there is no other.

    Args:
        done: called after each run.
    """
    pairs = list(itertools.product(ROUNDS_S, SHARES))
    tried = []
    for run in runs:
        tried.append({pair: machine.predict(run, *pair) for pair in pairs})
        done()

    def off(pair: tuple[float, float], others: Sequence[int]) -> float:
        return sum(math.log(tried[n][pair].step_s / runs[n].step_s) ** 2 for n in others)

    found = []
    for own, run in zip(tried, runs, strict=True):
        alike = [n for n, other in enumerate(runs) if other.rate == run.rate and other.step_s]
        others = [n for n in alike if runs[n].placed.policy != run.placed.policy] or alike
        found.append(own[min(pairs, key=lambda pair: off(pair, others))].latency_s)
    return found
