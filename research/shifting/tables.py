"""Results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console

from benchmarks.live.watch import Watched
from dance_jax.bench.tables import grid, milliseconds

from .results import Results, after_shift, differences, latencies_s
from .runs import Pause, Shift

_RUN = ("run", "latency: mean", "p50", "p99", "2nd task: mean", "remote", "migrations", "moved")


def show(console: Console, section: str, names: Sequence[str], results: Results) -> None:
    """Print a measured section; earlier sections are in `results` too."""
    found = getattr(results, section)
    match section:
        case "shift":
            _runs(
                console, {"no migration": found.stay, "migration": found.move}, found.plan.shift_s
            )
            _shift(console, names, found)
        case "accumulate":
            shift_s = None if results.shift is None else results.shift.plan.shift_s
            _runs(console, {"nothing fades": found}, shift_s)
        case "pause":
            _pause(console, found)
        case "stable":
            _runs(console, {"a stable workload": found}, None)


def _runs(console: Console, runs: Mapping[str, Watched], shift_s: float | None) -> None:
    """Print latencies in seconds and the remote share of each run.

    With `shift_s`, the remote share is given before and after the shift.
    """
    table = grid(*_RUN)
    for name, run in runs.items():
        times = latencies_s(run.answers)
        late = latencies_s(run.answers, shift_s) if shift_s is not None else []
        moves = ", ".join(f"{moment:.0f} s" for moment in run.moves_s) or "none"
        remote = f"{run.remote_share(0.0):.3f}"
        if shift_s is not None:
            remote = f"{run.remote_share(0.0, shift_s):.3f}, {run.remote_share(shift_s):.3f}"
        table.add_row(
            name,
            *(f"{value:.2f}" for value in (np.mean(times), *np.quantile(times, [0.5, 0.99]))),
            f"{np.mean(late):.2f}" if late else "-",
            remote,
            moves,
            str(run.samples[-1].experts_migrated),
        )
    console.print(table)
    if shift_s is not None:
        console.print(f"all users have changed their task at {shift_s:.0f} s")


def _shift(console: Console, names: Sequence[str], found: Shift) -> None:
    margins = differences(found.move, found.stay)
    console.print(
        f"outputs with and without migration: {len(margins)} of {len(found.move.answers)} differ"
        + (f", with margins up to {max(margins):.2g}" if margins else "")
    )
    if not (moves := after_shift(found)):
        return
    table = grid("after the shift", "remote", *(f"{name}, bytes/call" for name in names))
    rows = {
        "no migration": (found.stay, found.plan.shift_s),
        "migration": (found.move, moves[0]),
        "placed for the 2nd task": (found.placed, 0.0),
    }
    for name, (run, since_s) in rows.items():
        sent = (f"{each:.1f}" for each in run.sent_per_call(since_s))
        table.add_row(name, f"{run.remote_share(since_s):.3f}", *sent)
    console.print(table)


def _pause(console: Console, found: Pause) -> None:
    console.print(
        "[bold]Migrations during streams[/bold]\n"
        "in ms; gaps between tokens are given as median, 99th percentile and maximum"
    )
    table = grid("", "experts", "moved in", "longest step", "gaps before", "gaps during")
    for number, each in enumerate(found.rounds, 1):
        table.add_row(
            str(number),
            str(each.experts),
            f"{each.moving_s:.2f} s",
            milliseconds(each.longest_step_s),
            *(
                ", ".join(milliseconds(value) for value in np.quantile(gaps, [0.5, 0.99, 1]))
                for gaps in (each.before, each.moving)
            ),
        )
    console.print(table)
