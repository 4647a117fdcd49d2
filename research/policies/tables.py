"""Results as tables and lines of the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from .churn import KEEPING, Churn
from .figures import BLIND, COLUMNS, LATENCY, OPTIMAL, Row, Table
from .speed import Speed
from .targets import LITTLE, difference, gains

#: Columns of a table.
ROUTES = (*COLUMNS, "layer_time")
COUNTS = ("remote",)


def _grid(columns: Sequence[str]) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD)
    for column in columns:
        words = column in ("policy", "workload", "placement", "sizes")
        grid.add_column(column, justify="left" if words else "right", no_wrap=True)
    return grid


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _milliseconds(value: float | None) -> str:
    return _number(value, 1 if value is None or value < 100 else 0)


def _cell(table: Table, row: Row, column: str) -> str:
    """A figure, and below it the published one and the relative difference."""
    text = _number(getattr(row, column), 3)
    share = difference(table, row, column)
    if share is None:
        return text
    published = table.setup.published[row.policy][column]
    return f"{text}\n[dim]{published:g} {share:+.1%}[/dim]"


def print_table(console: Console, table: Table) -> None:
    """Prints all policies on one setup."""
    columns = COUNTS if table.setup.test is None else ROUTES
    heads = [column.replace("_", " ") for column in columns]
    setup = table.setup
    grid = _grid(["policy", *heads, "local", "bound", "ms"])
    for row in table.rows:
        cells = [_cell(table, row, column) for column in columns]
        last = [_number(row.local, 4), _number(row.bound, 4), _milliseconds(row.ms)]
        grid.add_row(row.policy, *cells, *last)
    _print(console, setup.title, setup.describe(), grid)


def _print(console: Console, title: str, about: str, grid: Grid) -> None:
    console.print(f"[bold]{title}[/bold]\n{about}", soft_wrap=True)
    console.print(grid)


def print_price(console: Console, measured: Sequence[Table]) -> None:
    """Prints what more holders cost: local share and any miss of all policies, side by side."""
    for servers in dict.fromkeys(len(table.setup.devices) for table in measured):
        same = [table for table in measured if len(table.setup.devices) == servers]
        heads = [
            f"{name}, survive {table.setup.survive}"
            for table in same
            for name in ("local", "any miss")
        ]
        grid = _grid(["policy", *heads])
        for rows in zip(*(table.rows for table in same), strict=True):
            cells = [(1 - row.remote, row.any_miss) for row in rows]
            grid.add_row(rows[0].policy, *(_number(value, 3) for pair in cells for value in pair))
        setup = same[0].setup
        about = f"{setup.describe()}; local and any miss are of unseen tokens"
        _print(console, f"The price of holders, {servers} servers", about, grid)


def fastest_line(table: Table) -> str:
    """Says whether LATENCY is the fastest on tokens that no policy saw."""
    found = table.over_best_other("layer_time")
    if found is None:
        return f"{LATENCY} is not among the policies: no comparison of predicted layer times."
    ratio, other = found
    if ratio > 1:
        return (
            f"{other} beats {LATENCY} on unseen tokens: its predicted layer time is "
            f"{1 - 1 / ratio:.1%} less."
        )
    return (
        f"No policy beats {LATENCY} on unseen tokens: {1 - ratio:.1%} less predicted layer time "
        f"than {other}, the best other."
    )


def gain_line(table: Table) -> str:
    """Says what counts gain over filling the memory blindly."""
    found = gains(table)
    if found is None:
        return f"{BLIND} is not among the policies: no comparison with a blind placement."
    best, blind, won = found
    verdict = "placement cannot win much here" if won < LITTLE else "placement wins"
    return (
        f"{best.policy} sends {best.remote:.1%} of calls elsewhere, {BLIND}, which fills the same "
        f"memory without statistics, {blind.remote:.1%}: {won:.1%} of all calls between them, "
        f"{verdict}."
    )


def counts_note() -> str:
    return (
        f"{LATENCY} is left out of tables of counts alone: without routes it falls back to "
        f"{OPTIMAL}."
    )


def print_churn(console: Console, rows: Sequence[Churn]) -> None:
    """Prints how many experts move, and what that gains."""
    if not rows:
        names = " or ".join(KEEPING)
        console.print(f"No policy considers the old placement: {names} is needed.")
        return
    about = (
        "old placements are made from the first half of the tokens, new ones from the second half; "
        "all figures are of the second half; share: moved, of all held experts"
    )
    columns = ["policy", "workload", "placement", "moved", "share", "remote", "layer time"]
    grid = _grid(columns)
    before = None
    for row in rows:
        if before not in (None, (row.policy, row.workload)):
            grid.add_section()
        before = (row.policy, row.workload)
        figures = [_number(row.remote, 3), _number(row.layer_time, 3)]
        moved = [f"{row.moved:,}", f"{row.moved / row.held:.1%}"]
        grid.add_row(row.policy, row.workload, row.how, *moved, *figures)
    _print(console, "Placements made anew", about, grid)


def print_speed(console: Console, rows: Sequence[Speed]) -> None:
    columns = ["policy", "sizes", "memory", "best ms", "median ms", "runs", "at most ms"]
    grid = _grid([*columns, "below bound"])
    for row in rows:
        sizes = f"{row.servers} x {row.layers} x {row.experts}"
        gap = "-" if row.bound is None else f"{max(1 - row.local / row.bound, 0):.1e}"
        times = [_milliseconds(row.best_ms), _milliseconds(row.median_ms), str(row.runs)]
        limit = _number(row.limit_ms, 0)
        grid.add_row(row.policy, sizes, f"{row.memory:g}", *times, limit, gap)
    about = "after a first run, which compiles; synthetic statistics; targets are for the best run"
    _print(console, "Times to solve", about, grid)
