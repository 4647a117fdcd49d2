"""Simulates runs that were measured, with speeds that were measured in them.

Computation takes the processor seconds that the engines counted (`simulation.fit`). Two costs are
not counted: that of a message besides its bytes (a thread that is woken has to find a core), and
that of a request besides its steps (HTTP, text, the time between two steps). The cost of a message
is the one with which steps of the *other* policies at the same rate take as long as they did. The
cost of a request is the median, over runs of the other policies at all rates, of what latency then
still lacks. So apart from computation, a policy's own runs have no part in its prediction.
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
from dance_jax.placement.activations import Activations
from research.simulation.fit import Fitted, fit
from research.simulator import Model, Requests, Scenario, Server, Work, simulate

from .workloads import Placed

#: Costs of a message that are tried, in seconds.
ROUNDS_S = (0.0, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 7e-4, 8e-4)
#: The share of a link's rate that carries payload; headers of packets take the rest.
PAYLOAD = 0.95


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """What the simulator needs to know of a measured run.

    Attributes:
        rate: bits per second of every link; None if links are not shaped.
        placed: the placement in force.
        plan: the requests.
        outputs: tokens of each answer, in the order of the plan's calls.
        activations: of the workload.
        work: the work of each server, window by window.
        step_s: mean seconds of a step; 0 if there was no step.
        latency_s: mean latency; nan if no answer was whole.
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
    """The work of each server in a run, in windows from one sample to the next."""
    servers = range(len(run.samples[0].steps))
    return tuple(
        tuple(_between(*pair, server) for pair in itertools.pairwise(run.samples))
        for server in servers
    )


def _between(first: Sample, last: Sample, server: int) -> Work:
    """The work of a server between two samples."""

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
    """A simulated run; times in seconds.

    Attributes:
        latency_s, step_s: means.
        computing_s: of each server, over all its steps, stops by a quota included.
    """

    latency_s: float
    step_s: float
    computing_s: tuple[float, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Machine:
    """What all runs have in common.

    Attributes:
        servers: with fitted speeds.
        model, config: of the engines.
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
        """Fits speeds to all runs.

        Args:
            runs: all that were measured.
            devices: of each server.
            slots: of each device, without spare ones.
            model, config: of the engines.

        Returns:
            The machine, and what was fitted for each server.

        Raises:
            UserError: servers stepped together; or the runs are too few, or too much alike.
        """
        if not any(work.messages for run in runs for windows in run.work for work in windows):
            raise UserError(
                "no expert calls were counted; servers that step together (--exchange collectives) "
                "cannot be simulated"
            )
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
        """Simulates a run; see `scenario`."""
        result = simulate(self.scenario(run, round_s))
        in_steps = (result.compute_seconds + result.communicate_seconds).sum()
        return Predicted(
            result.latency.mean,
            float(in_steps / result.steps.sum()),
            tuple(work.computing_s for work in result.work),
        )

    def scenario(self, run: Measured, round_s: float) -> Scenario:
        """The scenario of a run.

        Args:
            run: what was measured.
            round_s: seconds that a message takes besides its bytes.
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
    """Predicts the mean latency of each run, in seconds.

    The costs of messages and requests come from runs of other policies. If there are none at a
    rate, the cost of messages comes from runs of the same policy. If there are none at all,
    requests cost nothing.

    Args:
        machine: with fitted speeds.
        runs: what was measured.
        done: called after each run.
    """
    tried = []
    for run in runs:
        tried.append({round_s: machine.predict(run, round_s) for round_s in ROUNDS_S})
        done()

    def off(round_s: float, others: Sequence[int]) -> float:
        """How far the steps of these runs are from what they took."""
        return sum(math.log(tried[n][round_s].step_s / runs[n].step_s) ** 2 for n in others)

    def chosen(own: int, rate: int | None) -> tuple[float, list[int]]:
        """The cost of a message at a rate, and the runs of other policies there.

        Args:
            own: the run that is predicted.
        """
        # Runs without steps, or without a whole answer (a latency of nan), tell nothing.
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
