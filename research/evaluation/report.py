"""Tables, plots, targets and JSON of measured cells."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.namespaces import show_rate
from benchmarks.serving.plots import save
from benchmarks.targets import Target
from dance_jax.bench.tables import grid

from .cells import Cell, Mean, Row, rows_of
from .weight import PAPER_RATIO, nearest, weights_of

#: Targets for the mean latency of `latency`, over eplb's by workload, and over dance's. The paper's
#: placement was 30.6 % and 10.9 % faster than EPLB.
OVER_EPLB = {"big-bench": 0.6, "multidata": 0.45}
OVER_DANCE = 0.75
#: Target for the relative error of the simulated mean latency.
PREDICTED = 0.15
#: Attributes of cells whose means go into JSON.
_MEANS = (
    "remote", "any_miss", "transfers", "busiest", "load", "apart", "bound_bytes", "bytes_ratio",
    "utilisation", "steps", "tokens", "step_s", "computing_s", "failed",
)  # fmt: skip


def show(console: Console, cells: Sequence[Cell]) -> None:
    """Prints tables for each workload and rate, and the rate that comes nearest to the paper."""
    tables: dict[tuple[str, int | None], list[Row]] = {}
    rows = rows_of(cells)
    for row in rows:
        tables.setdefault((row.workload, row.rate), []).append(row)
    for (workload, rate), own in tables.items():
        console.print(f"[bold]{workload}, links {show_rate(rate)}[/bold]")
        console.print(_results(own))
        console.print(_times(own))
    weights = weights_of(rows)
    for weight in weights:
        console.print(weight.line(), markup=False, soft_wrap=True)
    for weight in nearest(weights):
        console.print(
            f"{weight.most.workload}: of these {weight.over_alone:.1f}, at "
            f"{show_rate(weight.most.rate)}, is nearest to the paper's {PAPER_RATIO}",
            soft_wrap=True,
        )


def _results(rows: Sequence[Row]) -> Table:
    """The figures by which policies are judged."""
    table = grid(
        "policy",
        "mean s",
        "p50",
        "p99",
        "remote",
        "any-miss",
        "transfers",
        "busiest",
        "load",
        "MB of each link",
        "/ bound",
        "utilised",
        "simulated",
    )
    for row in rows:
        table.add_row(
            row.policy,
            *(_shown(mean) for mean in (row.mean_s, row.p50_s, row.p99_s)),
            *(
                f"{row.average(name):.3f}"
                for name in ("remote", "any_miss", "transfers", "busiest", "load")
            ),
            " ".join(f"{sent / 1e6:.1f}" for sent in row.wire_bytes),
            f"{row.average('bytes_ratio'):.2f}",
            f"{row.average('utilisation'):.0%}",
            "-" if row.predicted_s is None else f"{row.predicted_s:.2f} s",
        )
    return table


def _times(rows: Sequence[Row]) -> Table:
    """Where the seconds of the mean server's steps go."""
    table = grid(
        "policy", "tokens", "steps", "ms/token", "steps, s", "computing", "waiting", "longer"
    )
    for row in rows:
        table.add_row(
            row.policy,
            *(f"{row.average(n):,.0f}" for n in ("tokens", "steps")),
            f"{1e3 * row.ratio('step_s', 'tokens'):.2f}",
            f"{row.average('step_s'):.1f}",
            f"{row.average('computing_s'):.1f}",
            f"{row.seconds['wait'] + row.seconds['exchange']:.1f}",
            f"{row.ratio('step_s', 'computing_s'):.2f} x",
        )
    return table


def _shown(mean: Mean) -> str:
    return f"{mean.value:.2f}" + ("" if mean.half is None else f"±{mean.half:.2f}")


def targets(cells: Sequence[Cell]) -> list[Target]:
    """All targets; those of latency at the rate where communication weighs as in the paper."""
    rows = rows_of(cells)
    mean_s = {(row.workload, row.rate, row.policy): row.mean_s.value for row in rows}
    off = [
        (abs(row.predicted_s / row.mean_s.value - 1), f"{row.workload}, {row.policy}")
        for row in rows
        if row.predicted_s is not None
    ]
    found = [Target("answers that are not whole", 0, sum(cell.failed for cell in cells))]
    for weight in nearest(weights_of(rows)):
        workload, rate = weight.most.workload, weight.most.rate
        for other, limit in (("eplb", OVER_EPLB.get(workload)), ("dance", OVER_DANCE)):
            ours, theirs = (mean_s.get((workload, rate, p)) for p in ("latency", other))
            if limit is not None and ours is not None and theirs is not None:
                name = f"{workload}, {show_rate(rate)}: mean latency of latency / {other}"
                found.append(Target(name, limit, ours / theirs))
    name = "share by which the simulator's mean latency is off"
    return [*found, Target.of_worst(name, PREDICTED, off)]


def plain(cells: Sequence[Cell]) -> dict[str, Any]:
    """Everything for JSON: figures over seeds, the weight of communication, and all cells."""
    rows = rows_of(cells)
    weights = weights_of(rows)
    return {
        "rows": [_plain(row) for row in rows],
        "weights": [weight.plain() for weight in weights],
        "nearest_to_paper": [weight.plain() for weight in nearest(weights)],
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }


def _plain(row: Row) -> dict[str, Any]:
    latency = {n: dataclasses.asdict(getattr(row, n)) for n in ("mean_s", "p50_s", "p99_s")}
    return {
        "workload": row.workload,
        "rate": row.rate,
        "policy": row.policy,
        "seeds": len(row.cells),
        **latency,
        **{name: row.average(name) for name in _MEANS},
        "wire_bytes": row.wire_bytes,
        "seconds": row.seconds,
        "predicted_s": row.predicted_s,
    }


def draw(cells: Sequence[Cell], path: pathlib.Path) -> None:
    """Draws the mean latency of all policies, a panel for each workload and rate."""
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
