"""What the simulator says of runs that were measured, with speeds that were measured in them.

What a server computes costs the processor seconds that its engine counted (`simulation.fit`). Two
things no clock tells: what a message costs besides its bytes (who is woken has to find a core), and
what a request takes besides its steps (HTTP, text, what is between two steps). The first is the one
with which steps of the *other* policies at the same rate take as long as they took, and the second
what the other policies' requests then took more at any rate, the median run's: a policy's own runs
have no part in its prediction but for computing.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.live.tasks import Plan
from benchmarks.live.watch import COMPUTING, Sample, Watched
from benchmarks.namespaces.bed import burst_bytes
from dance_jax.config import EngineConfig, UserError
from dance_jax.placement import Activations
from research.simulation.fit import Fitted, fit
from research.simulator import Model, Requests, Scenario, Server, Work, simulate

from .workloads import Placed

#: Seconds of a message that are tried.
ROUNDS_S = (0.0, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 7e-4, 8e-4)
#: Of a link's rate, what there is for payload beside headers of packets.
PAYLOAD = 0.95


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
        step_s: seconds of a step, in the mean; 0: there was none.
        latency_s: mean; nan: no answer was whole.
    """

    rate: int | None
    placed: Placed
    plan: Plan
    outputs: tuple[int, ...]
    activations: Activations
    work: tuple[tuple[Work, ...], ...]
    step_s: float
    latency_s: float


def work_of(run: Watched) -> tuple[tuple[Work, ...], ...]:
    """What each server did in a run, from one sample to the next: windows of different kinds."""
    servers = range(len(run.samples[0].steps))
    return tuple(
        tuple(_between(*pair, server) for pair in itertools.pairwise(run.samples))
        for server in servers
    )


def _between(first: Sample, last: Sample, server: int) -> Work:
    """What a server did between two samples."""

    def spent(values: str) -> float:
        return getattr(last, values)[server] - getattr(first, values)[server]

    buckets: collections.Counter[tuple[int, int]] = collections.Counter()
    for name, steps in last.bucket_steps.items():
        rows, _, more = name.partition("+")
        before = first.bucket_steps.get(name, [0.0] * len(steps))
        buckets[int(rows), int(more)] = round(steps[server] - before[server])
    return Work(
        steps=round(spent("steps")),
        buckets=+buckets,
        positions=round(spent("positions")),
        calls=round(spent("served")),
        messages=round(spent("messages")),
        rows=round(spent("rows")),
        repeats=round(spent("repeats")),
        computing_s=sum(last.seconds[p][server] - first.seconds[p][server] for p in COMPUTING),
        processor_s=spent("cpu_s"),
    )


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What the simulator says of a run; seconds, means.

    Attributes:
        computing_s: of each server, in all its steps, with what stops it.
    """

    latency_s: float
    step_s: float
    computing_s: tuple[float, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Machine:
    """All that runs have in common.

    Attributes:
        servers: with the speeds that were fitted.
        model, config: theirs.
    """

    servers: tuple[Server, ...]
    model: Model
    config: EngineConfig

    @classmethod
    def fitted(
        cls,
        runs: Sequence[Measured],
        devices: Sequence[int],
        slots: int,
        model: Model,
        config: EngineConfig,
    ) -> tuple[Machine, list[Fitted]]:
        """With speeds of all runs; and what was found of each server.

        Args:
            devices: of each server.
            slots: of each device, spare ones left out.

        Raises:
            UserError: servers stepped together; or runs are too few, or too much alike.
        """
        if not any(work.messages for run in runs for windows in run.work for work in windows):
            raise UserError("no expert calls were counted, as servers that step together make none")
        found = [
            fit([w for run in runs for w in run.work[server]], count, config.block_size)
            for server, count in enumerate(devices)
        ]
        servers = tuple(
            Server(count, slots, one.speed, beside=True)
            for count, one in zip(devices, found, strict=True)
        )
        return cls(servers, model, config), found

    def predict(self, run: Measured, round_s: float) -> Predicted:
        """What comes of a run; see `scenario`."""
        result = simulate(self.scenario(run, round_s))
        in_steps = (result.compute_seconds + result.communicate_seconds).sum()
        return Predicted(
            result.latency.mean,
            float(in_steps / result.steps.sum()),
            tuple(work.computing_s for work in result.work),
        )

    def scenario(self, run: Measured, round_s: float) -> Scenario:
        """A run, as the simulator wants it.

        Args:
            round_s: seconds that a message costs besides its bytes.
        """
        rate, burst = np.inf, 0
        if run.rate is not None:
            rate, burst = PAYLOAD * run.rate, burst_bytes(run.rate)
        calls = run.plan.calls
        return Scenario(
            tuple(
                dataclasses.replace(
                    server,
                    speed=dataclasses.replace(server.speed, round=round_s),
                    bandwidth=rate,
                    burst=burst,
                )
                for server in self.servers
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
            lock_step=False,
            counts=run.activations.counts,
        )


def predictions(
    machine: Machine, runs: Sequence[Measured], done: Callable[[], object] = lambda: None
) -> list[float]:
    """Mean latency of each run, in seconds.

    What messages and requests cost is chosen from runs of other policies. Where there are none at
    a rate, messages cost what those of the same one say; at any, requests cost nothing.

    Args:
        done: called after each run.
    """
    tried = []
    for run in runs:
        tried.append({round_s: machine.predict(run, round_s) for round_s in ROUNDS_S})
        done()

    def off(round_s: float, others: Sequence[int]) -> float:
        return sum(math.log(tried[n][round_s].step_s / runs[n].step_s) ** 2 for n in others)

    def chosen(own: int, rate: int | None) -> tuple[float, list[int]]:
        """A message's seconds at this rate, and the runs of other policies."""
        # No answer has no latency.
        whole = [n for n, run in enumerate(runs) if run.step_s and run.latency_s > 0]
        alike = [n for n in whole if runs[n].rate == rate]
        others = [n for n in alike if runs[n].placed.policy != runs[own].placed.policy]
        return min(ROUNDS_S, key=lambda round_s: off(round_s, others or alike)), others

    found = []
    for own, run in enumerate(runs):
        more = []
        for rate in {each.rate for each in runs}:
            round_s, others = chosen(own, rate)
            more += [runs[n].latency_s - tried[n][round_s].latency_s for n in others]
        best, _ = chosen(own, run.rate)
        request_s = max(0.0, float(np.median(more))) if more else 0.0
        found.append(tried[own][best].latency_s + request_s)
    return found
