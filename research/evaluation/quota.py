"""How much quota of cores a server that waited has left: its burst.

A quota lets a server's threads use so many cores, all together (`placement.simulate.shares`). What
the kernel keeps of it for a server that waited is less than what comes in in a period: it hands the
quota out to cores in slices, and a thread on another core finds none. So a burst is the one with
which the simulated computing of all runs together, in steps, stops included, takes as long as it
did. What a server's front end does, which has the same quota, is in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.namespaces.cores import PERIOD_US

from .predict import Machine, Measured

#: A message's seconds: any will do that let servers wait about as long for each other as they do.
TYPICAL_S = 4e-4
#: Halvings of the interval in which a burst is looked for, what comes in in a period.
TRIES = 8


def with_quotas(
    machine: Machine,
    runs: Sequence[Measured],
    cores: Sequence[float],
    done: Callable[[], object] = lambda: None,
) -> tuple[Machine, list[float]]:
    """With each server's quota and burst.

    Args:
        runs: all that were measured.
        cores: of each server.
        done: called TRIES times.

    Returns:
        It, and by which share each server's computing is off all the same: where the burst that is
        found is none or the most, a quota explains it in part.
    """
    runs = [run for run in runs if run.step_s]
    measured_n = np.sum(
        [[sum(w.computing_s for w in windows) for windows in run.work] for run in runs], axis=0
    )
    low_n, high_n = np.zeros(len(cores)), np.array(cores) * PERIOD_US / 1e6
    tried, off_n = machine, measured_n
    for _ in range(TRIES):
        burst_n = (low_n + high_n) / 2
        tried = _with(machine, cores, burst_n.tolist())
        found = [tried.predict(run, TYPICAL_S).computing_s for run in runs]
        off_n = np.sum(found, axis=0) / measured_n - 1
        # Who has a larger burst is stopped less.
        low_n, high_n = np.where(off_n > 0, burst_n, low_n), np.where(off_n > 0, high_n, burst_n)
        done()
    return tried, off_n.tolist()


def _with(machine: Machine, cores: Sequence[float], bursts: Sequence[float]) -> Machine:
    servers = tuple(
        dataclasses.replace(
            server, speed=dataclasses.replace(server.speed, quota=quota, burst=burst)
        )
        for server, quota, burst in zip(machine.servers, cores, bursts, strict=True)
    )
    return dataclasses.replace(machine, servers=servers)
