"""Targets of the policies, and whether they are reached."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from benchmarks.targets import Target

from .churn import AFRESH, Churn
from .figures import BLIND, COLUMNS, LATENCY, OPTIMAL, Row, Table
from .speed import Speed

#: Policies that must reproduce published figures, and the relative error that they may have.
REPRODUCED, TOLERANCE = ("dance", OPTIMAL), 0.02
#: Limits for LATENCY, all to be met by one placement, in setups with published figures.
LATENCY_LIMITS = {"any_miss": 0.54, "transfers": 0.58, "device": 0.30, "ms": 20_000.0}
#: Limits for LATENCY's figures over those of the best other policy, in all setups: for any_miss the
#: goal and a limit for regressions.
OVER_BEST_OTHER = (("any_miss", 0.95), ("any_miss", 1.0), ("layer_time", 1.0))
#: How far OPTIMAL's share of calls at home may be below its bound, as a share of the bound.
BOUND_GAP = 1e-4
#: Statistics gain little if the best policy keeps at most this share of all calls more at home than
#: BLIND.
LITTLE = 0.05


@dataclasses.dataclass
class Results:
    """What was measured; sections that were left out are missing."""

    #: Tables by section.
    tables: dict[str, list[Table]] = dataclasses.field(default_factory=dict)
    #: Tables with more holders, and those to compare them with.
    survive: list[Table] = dataclasses.field(default_factory=list)
    churn: list[Churn] = dataclasses.field(default_factory=list)
    speed: list[Speed] = dataclasses.field(default_factory=list)

    def all_tables(self) -> Iterator[Table]:
        for tables in self.tables.values():
            yield from tables


def difference(table: Table, row: Row, column: str) -> float | None:
    """The relative difference of a figure to the published one; None if there is none."""
    published = table.setup.published.get(row.policy, {}).get(column)
    value = row.comparable.get(column)
    return None if published is None or value is None else value / published - 1


def gains(table: Table) -> tuple[Row, Row, float] | None:
    """The policy with fewest remote calls, BLIND, and the share of all calls between them."""
    blind, best = table.row(BLIND), min(table.rows, key=lambda row: row.remote, default=None)
    return None if blind is None or best is None else (best, blind, blind.remote - best.remote)


def _reproduced(tables: list[Table]) -> Iterator[Target]:
    for policy in REPRODUCED:
        for column in COLUMNS:
            found = [
                (abs(share), f"{share:+.1%}")
                for table in tables
                if (row := table.row(policy))
                and (share := difference(table, row, column)) is not None
            ]
            yield Target.of_worst(f"{policy}: {column} off the published figure", TOLERANCE, found)


def _latency(tables: list[Table]) -> Iterator[Target]:
    for column, limit in LATENCY_LIMITS.items():
        found = [
            (getattr(row, column), "")
            for table in tables
            if table.setup.published and (row := table.row(LATENCY))
        ]
        yield Target.of_worst(f"{LATENCY}: {column}", limit, found)


def _compared(results: Results) -> Iterator[Target]:
    for column, limit in OVER_BEST_OTHER:
        found = [
            (ratio[0], f"{table.setup.title}, {ratio[1]}")
            for table in results.all_tables()
            if (ratio := table.over_best_other(column)) is not None
        ]
        name = f"{LATENCY}: {column.replace('_', ' ')} over the best other policy's"
        yield Target.of_worst(name, limit, found)


def _gaps(results: Results) -> Iterator[tuple[float, str]]:
    """OPTIMAL's gaps to its bound; not with `previous`, for which it may give up some calls."""
    for table in results.all_tables():
        row = table.row(OPTIMAL)
        if row and row.bound is not None:
            yield 1 - row.local / row.bound, table.setup.title
    for each in results.churn:
        if each.policy == OPTIMAL and each.how == AFRESH and each.bound is not None:
            yield 1 - each.local / each.bound, f"workload {each.workload}, {each.how}"
    for each in results.speed:
        if each.policy == OPTIMAL and each.bound is not None:
            yield 1 - each.local / each.bound, _sizes(each)


def _sizes(case: Speed) -> str:
    return f"{case.servers} x {case.layers} x {case.experts}, memory {case.memory:g}"


def _times(speed: list[Speed]) -> Iterator[Target]:
    limits = {(s.policy, s.servers, s.layers, s.experts): s.limit_ms for s in speed}
    for (policy, *sizes), limit in limits.items():
        if limit is not None:
            found = [
                (case.best_ms, f"memory {case.memory:g} x the model")
                for case in speed
                if (case.policy, case.servers, case.layers, case.experts) == (policy, *sizes)
            ]
            name = f"{policy}: ms for {' x '.join(map(str, sizes))}, best of some runs"
            yield Target.of_worst(name, limit, found)


def targets(results: Results) -> list[Target]:
    """All targets, of the sections that were measured."""
    reference = results.tables.get("reference", [])
    differing = [
        (float(not row.repeatable), "" if row.repeatable else f"{row.policy}, {table.setup.title}")
        for table in results.all_tables()
        for row in table.rows
    ]
    return [
        *_reproduced(reference),
        *_latency(reference),
        *_compared(results),
        Target.of_worst(f"{OPTIMAL}: below its bound", BOUND_GAP, _gaps(results)),
        Target.of_worst("placements that differ in a second run", 0.0, differing),
        *_times(results.speed),
    ]
