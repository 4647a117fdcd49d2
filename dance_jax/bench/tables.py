"""Figures as tables and lines on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from dance_jax.bench.figures import Figures, Spread

TIMES = ("ttft", "tpot", "itl", "e2e")


def grid(*columns: str, left: int = 1) -> Table:
    """Return a table whose first `left` columns are left-aligned text, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return table


def milliseconds(seconds: float) -> str:
    """Format a time in milliseconds."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def cells(spread: Spread | None) -> list[str]:
    """Return the cells of a row of times: mean, p50, p90 and p99 in milliseconds."""
    if spread is None:
        return ["-"] * 4
    return [milliseconds(value) for value in (spread.mean, spread.p50, spread.p90, spread.p99)]


def print_load(console: Console, rows: Sequence[Figures]) -> None:
    """Print the rates, then the times, of each server and of all."""
    rates = grid("server", "requests", "failed", "requests/s", "prompt tokens/s", "output tokens/s")
    times = grid("server", "ms", "mean", "p50", "p90", "p99", left=2)
    for row in rows:
        found = (row.request_rate, row.prompt_rate, row.output_rate)
        shown = [f"{found[0]:.2f}", *(f"{rate:.1f}" for rate in found[1:])]
        rates.add_row(row.server, str(row.requests), str(row.failed), *shown)
        for name in TIMES:
            head = row.server if name == TIMES[0] else ""
            times.add_row(head, name.upper(), *cells(getattr(row, name)))
        times.add_section()
    console.print(rates)
    console.print(times)


def print_failed(console: Console, failed: Sequence[str], most: int = 5) -> None:
    """Print the first reasons of failed requests, and the number of the others."""
    for why in failed[:most]:
        console.print(f"failed: {why}", markup=False, soft_wrap=True)
    if len(failed) > most:
        console.print(f"and {len(failed) - most} more failed")
