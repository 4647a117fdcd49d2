"""How fast servers compute between the moments in which their quota of cores stops them.

Seconds that an engine's clock counts as computing are also those in which the kernel stops its host
for the rest of a period, since it has used up its quota: many where a layer computes at length, few
where it often waits. So a fitted speed depends on the load, and what is between stops does not.
What was found on a testbed: computing keeps about one core busy, whatever the number of devices,
and its seconds are processor seconds and stops. So

- a quota of a core or more stops nobody, and one of less lets a server compute for that share of
  the time (`placement.simulate.shares`);
- the part of fitted seconds between stops is that of processor seconds: by least squares over runs,

    cpu_s[run] = part x fitted computing seconds[run] + second_per_byte x bytes moved[run];

- how much quota a server that waited has left, its burst, is what makes the simulated computing of
  all runs together as long as it was. It is less than a period's quota: the kernel hands it out to
  cores in slices, and a thread on another core finds none.

What an engine's threads do while it rests is taken for computing; what its front end does, which
has the same quota, is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.namespaces.cores import PERIOD_US
from benchmarks.simulation.fit import Fitted, solve
from dance_jax.placement.simulate import Speed, Work

from .predict import Machine, Measured

#: A round's seconds and the share of a link's rate: any will do that let servers wait about as long
#: for each other as they do.
TYPICAL = (3e-4, 1.05)
#: Halvings of the interval in which a burst is looked for, a period long.
TRIES = 8


def unstopped(
    machine: Machine,
    runs: Sequence[Measured],
    cores: Sequence[float],
    done: Callable[[], object] = lambda: None,
) -> tuple[Machine, list[float]]:
    """With speeds between stops, and the quota's stops.

    Args:
        machine: with speeds that have stops in them.
        runs: all that were measured.
        cores: of each server.
        done: called TRIES times.

    Returns:
        It, and by which share each server's computing is off all the same: where the burst that is
        found is none or a whole period, a quota explains it in part.

    Raises:
        UserError: runs are too few or too much alike to tell computing from moving bytes.
    """
    runs = [run for run in runs if run.step_s]
    share_n = np.minimum(cores, 1.0)
    part_n = np.array(
        [_processor_part(one.speed, runs, server) for server, one in enumerate(machine.fitted)]
    )
    steps = np.array([sum(window.steps for window in run.work[0]) for run in runs])
    measured_n = _computing(runs) / steps.sum()
    low_n, high_n = np.zeros(len(cores)), np.full(len(cores), PERIOD_US / 1e6)
    burst_n = high_n
    scale_n = np.where(share_n < 1, np.minimum(part_n, 1), 1.0)
    off_n = np.zeros(len(cores))
    for _ in range(TRIES):
        burst_n = (low_n + high_n) / 2
        tried = _with(machine, scale_n, share_n, burst_n)
        found = [tried.predict(run, *TYPICAL).computing_s for run in runs]
        computing_n = np.average(found, axis=0, weights=steps)
        # Who has a larger burst is stopped less.
        low_n = np.where(computing_n > measured_n, burst_n, low_n)
        high_n = np.where(computing_n > measured_n, high_n, burst_n)
        scale_n = np.where(share_n < 1, scale_n, scale_n * measured_n / computing_n)
        off_n = computing_n / measured_n - 1
        done()
    return _with(machine, scale_n, share_n, burst_n), off_n.tolist()


def _computing(runs: Sequence[Measured]) -> np.ndarray:
    """float64 [n]: measured seconds of computing, stops included, of all runs."""
    return np.array(
        [
            [sum(w.step_s + w.trunk_s + w.experts_s for w in windows) for windows in run.work]
            for run in runs
        ]
    ).sum(0)


def _processor_part(speed: Speed, runs: Sequence[Measured], server: int) -> float:
    """Processor seconds of a second of computing at this speed."""

    def computing(work: Work) -> float:
        trunk_s = sum(speed.buckets[bucket] * steps for bucket, steps in work.buckets.items())
        calls_s = speed.call * work.calls + speed.expert * work.experts
        return speed.step * work.steps + trunk_s + calls_s

    seconds = [run.cpu_s[server] for run in runs]
    windows = [run.work[server] for run in runs]
    amounts = {
        "computing": [sum(map(computing, own)) for own in windows],
        "bytes": [float(sum(work.bytes for work in own)) for own in windows],
    }
    return solve("processor", seconds, amounts, seconds).cost["computing"]


def _with(
    machine: Machine, scale_n: np.ndarray, share_n: np.ndarray, burst_n: np.ndarray
) -> Machine:
    """Costs so many times as high, and these quotas."""

    def of(one: Fitted, scale: float, share: float, burst: float) -> Fitted:
        speed = one.speed
        costs = {name: scale * getattr(speed, name) for name in ("step", "token", "call", "expert")}
        buckets = {bucket: scale * seconds for bucket, seconds in speed.buckets.items()}
        changed = dataclasses.replace(speed, **costs, buckets=buckets, share=share, burst=burst)
        return dataclasses.replace(one, speed=changed)

    each = zip(machine.fitted, scale_n.tolist(), share_n.tolist(), burst_n.tolist(), strict=True)
    return dataclasses.replace(machine, fitted=[of(*one) for one in each])
