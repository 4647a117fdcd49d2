"""Metrics of the placements of all policies on one setup."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dance_jax.placement.core import Placement
from dance_jax.placement.measures import Traffic
from dance_jax.placement.policies import place

from .published import Figures
from .setups import Setup

#: The policy that predicts time, and the one that replaces it without routes.
LATENCY, OPTIMAL = "latency", "optimal"
#: A policy that fills all memory without statistics.
BLIND = "redundance"
#: The metrics that are measured on tokens, beside the predicted time.
COLUMNS = ("remote", "any_miss", "transfers", "busiest", "load", "device")

#: Prints progress.
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """One policy on one setup; `research.policies` explains the columns."""

    policy: str
    remote: float
    #: This and the next five are None without routes.
    any_miss: float | None
    transfers: float | None
    busiest: float | None
    load: float | None
    device: float | None
    layer_time: float | None
    local: float
    bound: float | None
    ms: float
    #: A second run gave the same placement.
    repeatable: bool
    #: By column, the figures to compare with published ones: of equal servers, tokens visit the one
    #: with the lowest number.
    comparable: Figures = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """All policies on one setup."""

    setup: Setup
    rows: list[Row]
    #: Placements by policy.
    placements: dict[str, Placement]

    def row(self, policy: str) -> Row | None:
        return next((row for row in self.rows if row.policy == policy), None)

    def over_best_other(self, column: str) -> tuple[float, str] | None:
        """LATENCY's figure over the least figure of another policy, and the name of that policy.

        None if either figure is not known; figures of 0 count as not known.
        """
        known = {row.policy: value for row in self.rows if (value := getattr(row, column))}
        ours = known.pop(LATENCY, None)
        if ours is None or not known:
            return None
        best = min(known, key=lambda policy: known[policy])
        return ours / known[best], best


def solve(policy: str, setup: Setup, previous: Placement | None = None) -> tuple[Placement, float]:
    """A policy's placement of the setup, and the milliseconds that it took."""
    start = time.perf_counter()
    placement = place(
        policy,
        setup.counts,
        setup.capacities,
        holders=setup.survive + 1,
        routes=setup.fit,
        devices=setup.devices,
        cost=setup.cost,
        previous=previous,
    )
    return placement, (time.perf_counter() - start) * 1e3


def measure(setup: Setup, policies: Iterable[str], say: Say) -> Table:
    """Solves with every policy, twice, and measures the second placement.

    Without routes LATENCY is left out, because OPTIMAL would take its place.
    """
    table = Table(setup, [], {})
    for policy in policies:
        if policy == LATENCY and setup.fit is None:
            continue
        first, _ = solve(policy, setup)
        placement, ms = solve(policy, setup)
        say(f"{setup.title}: {policy}, {ms:,.1f} ms")
        table.rows.append(row(policy, setup, placement, ms, first == placement))
        table.placements[policy] = placement
    return table


def row(policy: str, setup: Setup, placement: Placement, ms: float, repeatable: bool) -> Row:
    """Measures a placement on tokens that the policy did not see; without routes, on the counts."""
    local = placement.local_share(setup.counts)
    figures: dict[str, Any] = dict.fromkeys((*COLUMNS, "layer_time")) | {"remote": 1 - local}
    comparable: Figures = {"remote": 1 - local}
    if setup.test is not None and setup.cost is not None:
        servers, devices = len(setup.devices), setup.devices
        traffic = placement.traffic(setup.test, setup.cost.preferences())
        figures = {**_figures(traffic, devices), "layer_time": traffic.layer_time(setup.cost)}
        lowest_first = np.tile(np.arange(servers), (servers, 1))
        comparable = _figures(placement.traffic(setup.test, lowest_first), devices)
    return Row(
        policy=policy,
        **figures,
        local=local,
        bound=placement.upper_bound,
        ms=ms,
        repeatable=repeatable,
        comparable=comparable,
    )


def _figures(traffic: Traffic, devices: Sequence[int]) -> dict[str, float]:
    """The metrics by column."""
    found = (
        traffic.remote,
        traffic.any_miss,
        traffic.transfers,
        traffic.busiest,
        traffic.load(devices),
        traffic.device(devices),
    )
    return dict(zip(COLUMNS, found, strict=True))
