"""Tables, plots, targets and JSON of the cells that were measured."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.namespaces import show_rate
from benchmarks.serving.plots import save
from benchmarks.serving.tables import grid
from benchmarks.targets import Target

from .cells import Cell, Mean, Row, rows_of

#: Mean latency of `latency` over that of another policy: by workload over eplb's, over dance's.
#: The paper's own placement won 30.6 % and 10.9 % over EPLB.
OVER_EPLB = {"big-bench": 0.69, "multidata": 0.89}
OVER_DANCE = 0.9
#: Simulated mean latency, off the measured one.
PREDICTED = 0.15
#: The paper's layers took so many times as long when all calls were remote.
PAPER_RATIO = 8.3


def show(console: Console, cells: Sequence[Cell]) -> None:
    """A table for each workload and rate."""
    tables: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows_of(cells):
        tables.setdefault((row.workload, row.rate), []).append(row)
    for (workload, rate), rows in tables.items():
        console.print(f"[bold]{workload}, links {show_rate(rate)}[/bold]")
        table = grid(
            "policy",
            "mean s",
            "p50",
            "p99",
            "remote",
            "transfers",
            "busiest",
            "load",
            "MB",
            "/ bound",
            "computing",
            "exchanging",
            "waiting",
            "utilised",
            "simulated",
        )
        for row in rows:
            table.add_row(
                row.policy,
                *(_shown(mean) for mean in (row.mean_s, row.p50_s, row.p99_s)),
                *(f"{row.average(n):.3f}" for n in ("remote", "transfers", "busiest", "load")),
                f"{np.mean([sum(cell.wire_bytes) for cell in row.cells]) / 1e6:.1f}",
                f"{row.average('bytes_ratio'):.2f}",
                f"{row.average('computing_s'):.1f} s",
                f"{row.seconds('exchange'):.1f} s",
                f"{row.seconds('wait'):.1f} s",
                f"{row.average('utilisation'):.0%}",
                "-" if row.predicted_s is None else f"{row.predicted_s:.2f} s",
            )
        console.print(table)


def _shown(mean: Mean) -> str:
    return f"{mean.value:.2f}" + ("" if mean.half is None else f"±{mean.half:.2f}")


def targets(cells: Sequence[Cell]) -> list[Target]:
    """At the rate where communication weighs most like in the paper."""
    rows = {(row.workload, row.rate, row.policy): row for row in rows_of(cells)}
    rows_off = [
        (abs(row.predicted_s / row.mean_s.value - 1), f"{row.workload}, {row.policy}")
        for row in rows.values()
        if row.predicted_s is not None
    ]
    found = [Target("answers that are not whole", 0, sum(cell.failed for cell in cells))]
    for workload, rate in dict.fromkeys((cell.workload, cell.rate) for cell in cells):
        for other, limit in (("eplb", OVER_EPLB.get(workload)), ("dance", OVER_DANCE)):
            ours, theirs = (rows.get((workload, rate, p)) for p in ("latency", other))
            if limit is not None and ours is not None and theirs is not None:
                name = f"{workload}, {show_rate(rate)}: mean latency of latency / {other}"
                found.append(Target(name, limit, ours.mean_s.value / theirs.mean_s.value))
    off = "share by which the simulator's mean latency is off"
    return [*found, Target.of_worst(off, PREDICTED, rows_off)]


def weight(row: Row) -> float:
    """Seconds of steps over those in which nothing is exchanged or waited for: how much longer
    they are for communication, to compare with PAPER_RATIO."""
    return row.seconds("schedule", "compute", "experts", "output", "wait", "exchange") / max(
        row.average("computing_s"), 1e-9
    )


def plain(cells: Sequence[Cell]) -> dict[str, Any]:
    """For JSON."""
    rows = [
        {
            "workload": row.workload,
            "rate": row.rate,
            "policy": row.policy,
            "steps_longer_for_communication": weight(row),
            **{
                name: dataclasses.asdict(getattr(row, name))
                for name in ("mean_s", "p50_s", "p99_s")
            },
        }
        for row in rows_of(cells)
    ]
    return {"rows": rows, "cells": [dataclasses.asdict(cell) for cell in cells]}


def draw(cells: Sequence[Cell], path: pathlib.Path) -> None:
    """Mean latency of all policies, a panel for each workload and rate."""
    rows = rows_of(cells)
    places = list(dict.fromkeys((row.workload, row.rate) for row in rows))

    def panel(place: tuple[str, int | None]) -> Any:
        own = [row for row in rows if (row.workload, row.rate) == place]

        def fill(axes: Any) -> None:
            means = [row.mean_s.value for row in own]
            halves = [row.mean_s.half or 0.0 for row in own]
            axes.bar([row.policy for row in own], means, yerr=halves, capsize=3)
            axes.set(ylabel="mean latency, s", title=f"{place[0]}, {show_rate(place[1])}")
            axes.tick_params("x", rotation=45)

        return fill

    save([panel(place) for place in places], path)
