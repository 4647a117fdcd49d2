"""Results as tables and lines of the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from .runs import BASELINE, Run


def _grid(*columns: str, left: int = 1) -> Table:
    """A table whose first `left` columns are words, the others numbers."""
    grid = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        grid.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return grid


def less(run: Run, runs: Iterable[Run]) -> float | None:
    """The share by which mean latency is below the baseline's in the same scenario.

    None for the baseline itself, or if the baseline was not run.
    """
    if run.policy == BASELINE:
        return None
    for other in runs:
        if other.policy == BASELINE and _scenario(other) == _scenario(run):
            return 1 - run.mean / other.mean
    return None


def _scenario(run: Run) -> tuple[object, ...]:
    return (
        run.section, run.workload, run.devices, run.bandwidth, run.interval_s, run.lock_step,
        run.messages,
    )  # fmt: skip


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def print_ways(console: Console, title: str, runs: Sequence[Run]) -> None:
    """Prints all policies on one workload, a table for each way of serving."""
    for served in dict.fromkeys(run.way for run in runs):
        # rich would cut a table's own title to the width of the table.
        console.print(f"[bold]{title}, {served}: seconds of {runs[0].requests} requests[/]")
        grid = _grid(
            "policy", "mean", f"< {BASELINE}", "p50", "p99", "TTFT", "its p50", "its p99",
            "network", "link", "device", "MB sent",
        )  # fmt: skip
        for run in (run for run in runs if run.way == served):
            seconds = (run.p50, run.p99, run.ttft_mean, run.ttft_p50, run.ttft_p99)
            grid.add_row(
                run.policy,
                f"{run.mean:.2f}",
                _share(less(run, runs)),
                *(f"{each:.2f}" for each in seconds),
                _share(run.network),
                _share(run.busiest_link),
                _share(run.busiest_device),
                f"{sum(run.sent_bytes) / 1e6:,.0f}",
            )
        console.print(grid)
    console.print(
        f"< {BASELINE}: mean latency below that of {BASELINE}. network: share of communication in "
        "the critical path. link, device: share of time in which the busiest one is in use.",
        markup=False,
    )


def print_sweep(console: Console, runs: Sequence[Run]) -> None:
    """Prints mean latencies, a table for each way of serving and policy."""
    intervals = sorted({run.interval_s for run in runs})
    for served, policy in dict.fromkeys((run.way, run.policy) for run in runs):
        own = [run for run in runs if (run.way, run.policy) == (served, policy)]
        heads = [f"every {interval:g} s" for interval in intervals]
        console.print(f"[bold]Sweep, {served}, {policy}: mean seconds, and below {BASELINE}[/]")
        grid = _grid("devices", "servers", "Mbps", *heads, "steps", left=0)
        for devices, servers, bandwidth in dict.fromkeys(
            (run.devices, run.servers, run.bandwidth) for run in own
        ):
            row = {r.interval_s: r for r in own if (r.devices, r.bandwidth) == (devices, bandwidth)}
            cells = [_cell(row[interval], runs) for interval in intervals]
            steps = f"{max(run.steps for run in row.values()):,}"
            grid.add_row(str(devices), str(servers), f"{bandwidth / 1e6:g}", *cells, steps)
        console.print(grid)
        for line in trends(own):
            console.print(line, markup=False)


def _cell(run: Run, runs: Sequence[Run]) -> str:
    share = less(run, runs)
    return f"{run.mean:.2f}" if share is None else f"{run.mean:.2f} [dim]{share:5.1%}[/dim]"


def trends(runs: Sequence[Run]) -> list[str]:
    """How more devices and more bandwidth change one policy's latency, beside the paper's claim."""
    devices = sorted({run.devices for run in runs})
    rates = sorted({run.bandwidth for run in runs})
    lines = []
    if len(devices) > 1:
        changes = [
            _mean(runs, devices[-1], rate) / _mean(runs, devices[0], rate) - 1 for rate in rates
        ]
        lines.append(
            f"From {devices[0]} to {devices[-1]} devices the mean changes by {min(changes):+.0%} "
            f"to {max(changes):+.0%} (the paper's simulation: -19 to -9 % from 4 to 256)."
        )
    if len(rates) > 1:
        changes = [
            _mean(runs, count, rates[-1]) / _mean(runs, count, rates[0]) - 1 for count in devices
        ]
        each = ", ".join(
            f"{change:+.0%} at {count}" for change, count in zip(changes, devices, strict=True)
        )
        lines.append(
            f"From {rates[0] / 1e6:g} to {rates[-1] / 1e6:g} Mbps it changes by {each} devices "
            "(the paper: over -55 % at 4, -35 % at 256)."
        )
    return lines


def _mean(runs: Sequence[Run], devices: int, bandwidth: float) -> float:
    """Mean latency of one cluster over all intervals."""
    found = [run.mean for run in runs if (run.devices, run.bandwidth) == (devices, bandwidth)]
    return sum(found) / len(found)
