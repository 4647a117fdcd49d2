"""How fast servers would compute if their quota of cores never stopped them.

Seconds that an engine's clock counts as computing are also those in which the kernel stops its host
for the rest of a period, because the quota is used up: many where it computes at length, few where
it often waits. So a server's speed depends on the run. Its speed between stops does not: with it,
and with a quota as the simulator has it (`placement.simulate.shares`), steps have to take as long
to compute as they took. That is solved for here. How many cores it uses between stops is known from
the processor seconds of its engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from benchmarks.namespaces.cores import PERIOD_US
from benchmarks.simulation.fit import Fitted

from .predict import Machine, Measured

#: A round's seconds and the share of a link's rate: any will do that let servers wait about as long
#: for each other as they do.
TYPICAL = (3e-4, 1.05)
#: The simulator is asked until speeds change by less than this share, and at most so many times: of
#: a server that is stopped nearly always, only the processor seconds say how fast it is.
CLOSE, TRIES = 0.005, 20


def unstopped(machine: Machine, runs: Sequence[Measured], cores: Sequence[float]) -> Machine:
    """With speeds between stops, and the quota's stops.

    Args:
        machine: with speeds that have stops in them.
        runs: all that were measured.
        cores: of each server.
    """
    steps = np.array([sum(window.steps for window in run.work[0]) for run in runs])
    computing_rn = np.array(
        [[sum(window.computing_s for window in own) for own in run.work] for run in runs]
    )
    measured_n = computing_rn.sum(0) / steps.sum()
    processor_n = np.array([run.cpu_s for run in runs]).sum(0) / steps.sum()

    def predicted(tried: Machine) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of computing, and of stops in them, of a mean step of all runs: float64 [n]."""
        found = [tried.predict(run, *TYPICAL) for run in runs]
        computing_n, stopped_n = (
            np.average([getattr(one, name) for one in found], axis=0, weights=steps)
            for name in ("computing_s", "stopped_s")
        )
        return computing_n, stopped_n

    found, scale_n = machine, np.ones(len(cores))
    for _ in range(TRIES):
        computing_n, stopped_n = predicted(found)
        change_n = measured_n / computing_n
        scale_n = scale_n * change_n
        between_n = (computing_n - stopped_n) * change_n
        share_n = np.minimum(np.asarray(cores) * between_n / processor_n, 1.0)
        found = _with(machine, scale_n, share_n)
        if np.abs(change_n - 1).max() < CLOSE:
            break
    return found


def _with(machine: Machine, scale_n: np.ndarray, share_n: np.ndarray) -> Machine:
    """Speeds by so many times, and these shares."""

    def of(one: Fitted, scale: float, share: float) -> Fitted:
        speed = one.speed
        changed = {
            name: scale * getattr(speed, name) for name in ("step", "token", "call", "expert")
        }
        changed["buckets"] = {bucket: scale * s for bucket, s in speed.buckets.items()}
        changed |= {"share": share, "burst": share * PERIOD_US / 1e6}
        return dataclasses.replace(one, speed=dataclasses.replace(speed, **changed))

    each = zip(machine.fitted, scale_n.tolist(), share_n.tolist(), strict=True)
    return dataclasses.replace(machine, fitted=[of(*one) for one in each])
