"""Fits the burst of each server: the quota of cores that it has saved after waiting.

A quota limits the cores that all threads of a server together use (`research.simulator.shares`).
The kernel keeps less of it for a server that waited than comes in during a period: it hands the
quota out to cores in slices, and a thread on another core finds none. The burst is fitted so that
the simulated computing of all runs together, in steps and with stops, takes as long as it did. That
includes the effect of the server's front end, which shares the quota.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.namespaces.cores import PERIOD_US

from .predict import Machine, Measured

#: Seconds of a message: any value with which servers wait for each other about as long as they did.
TYPICAL_S = 4e-4
#: Steps of the bisection of a burst, between 0 and the quota of a period.
TRIES = 8


def with_quotas(
    machine: Machine,
    runs: Sequence[Measured],
    cores: Sequence[float],
    done: Callable[[], object] = lambda: None,
) -> tuple[Machine, list[float]]:
    """Gives each server its quota and fits its burst.

    Args:
        machine: with fitted speeds.
        runs: all that were measured.
        cores: the quota of each server.
        done: called TRIES times.

    Returns:
        The machine, and the relative error of each server's computing that remains. It is large if
        the burst ends at a limit: then the quota explains only a part of the stops.
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
        # A server with a larger burst is stopped less.
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
