"""How much moves when a placement is made anew, and what staying close to the old one costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from dance_jax.placement.core import Placement

from .figures import LATENCY, OPTIMAL, Say, row, solve
from .setups import Setup, normalised
from .traces import count

#: The policies that look at `previous`.
KEEPING = (OPTIMAL, LATENCY)
STABLE, SHIFTED = "the same", "shifted"
KEPT, GIVEN, AFRESH = "kept", "previous given", "afresh"


@dataclasses.dataclass(frozen=True)
class Churn:
    """A placement after the workload went on; see `measure_churn`."""

    policy: str
    #: STABLE: other tokens of the same workloads; SHIFTED: each server has its neighbour's.
    workload: str
    #: KEPT: the old placement; GIVEN: a new one, `previous` is the old one; AFRESH: without it.
    how: str
    moved: int
    #: Experts that all servers hold in all.
    held: int
    remote: float
    layer_time: float
    local: float
    bound: float | None


def going_on(setup: Setup, shift: int) -> Setup:
    """The second half of the tokens, seen now: to fit, and to measure on."""
    assert setup.test is not None, "a setup with routes is needed"
    routes = setup.test[shift:] + setup.test[:shift]
    counts = np.stack([count(route, setup.counts.shape[2]) for route in routes])
    return dataclasses.replace(
        setup, counts=normalised(counts), fit=routes, test=routes, published={}
    )


def measure_churn(setup: Setup, policies: Iterable[str], say: Say) -> list[Churn]:
    """Of the policies that look at `previous`, those among `policies`.

    The old placement is made from the first half of the tokens, the new ones from the second half,
    and all are measured on that second half: what the policy knows when it decides.
    """
    rows = []
    for policy in (policy for policy in policies if policy in KEEPING):
        old, _ = solve(policy, setup)
        for workload, shift in ((STABLE, 0), (SHIFTED, 1)):
            now = going_on(setup, shift)
            new: dict[str, Placement] = {KEPT: Placement(old.resident)}
            for how, previous in ((GIVEN, old), (AFRESH, None)):
                new[how], ms = solve(policy, now, previous)
                say(f"{setup.title}, workload {workload}: {policy}, {how}, {ms:,.1f} ms")
            rows += [_churn(policy, workload, how, now, each, old) for how, each in new.items()]
    return rows


def _churn(
    policy: str, workload: str, how: str, now: Setup, new: Placement, old: Placement
) -> Churn:
    figures = row(policy, now, new, 0.0, True)
    assert figures.layer_time is not None
    return Churn(
        policy,
        workload,
        how,
        new.moved(old),
        int(new.resident.sum()),
        figures.remote,
        figures.layer_time,
        figures.local,
        figures.bound,
    )
