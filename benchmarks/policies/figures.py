"""What the placements of all policies cost on one setup."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable

from dance_jax.placement import Placement, place

from .setups import Setup

#: The policy that predicts time; without routes it is OPTIMAL.
LATENCY, OPTIMAL = "latency", "optimal"
#: A policy that fills all memory and looks at no statistics.
BLIND = "redundance"

#: What is told of every solved policy.
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """One policy on one setup; what the columns mean is said in `benchmarks.policies`."""

    policy: str
    remote: float
    #: None: there are no routes.
    transfers: float | None
    busiest: float | None
    load: float | None
    layer_time: float | None
    local: float
    bound: float | None
    ms: float
    #: A second run gave the same placement.
    repeatable: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """All policies on one setup."""

    setup: Setup
    rows: list[Row]
    #: By policy.
    placements: dict[str, Placement]

    def row(self, policy: str) -> Row | None:
        return next((row for row in self.rows if row.policy == policy), None)

    def fastest_other(self) -> Row | None:
        """Of the policies other than LATENCY, that with the least layer time."""
        timed = [r for r in self.rows if r.policy != LATENCY and r.layer_time is not None]
        return min(timed, key=lambda row: row.layer_time or 0.0, default=None)


def solve(policy: str, setup: Setup, previous: Placement | None = None) -> tuple[Placement, float]:
    """A placement of the setup and the milliseconds that it took."""
    start = time.perf_counter()
    placement = place(
        policy,
        setup.counts,
        setup.capacities,
        routes=setup.fit,
        devices=setup.devices,
        previous=previous,
    )
    return placement, (time.perf_counter() - start) * 1e3


def measure(setup: Setup, policies: Iterable[str], say: Say) -> Table:
    """Solves with every policy, twice, and measures what came out.

    Without routes LATENCY is left out, which then is OPTIMAL.
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
    """Measures a placement on tokens that the policy did not see, or else on the counts."""
    local = placement.local_share(setup.counts)
    if setup.test is None or setup.cost is None:
        figures = (1 - local, None, None, None, None)
    else:
        traffic = placement.traffic(setup.test)
        figures = (
            traffic.remote,
            traffic.transfers,
            traffic.busiest,
            traffic.load(setup.devices),
            traffic.layer_time(setup.cost),
        )
    return Row(policy, *figures, local, placement.upper_bound, ms, repeatable)
