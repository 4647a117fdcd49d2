"""Results of the sections as tables and lines on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from dance_jax.bench.figures import Spread
from dance_jax.bench.tables import TIMES, cells, grid, print_failed, print_load

from .idle import Idle
from .long import Row
from .memory import Sample
from .prefix import Prefix
from .soak import Soak
from .static import Static


def print_static(console: Console, found: Static) -> None:
    batches, ours = found.saturated_batches, found.saturated_ours
    console.print(
        "[bold]One batch at a time, and continuous batching[/bold]\n"
        f"at saturation: {batches.token_rate:.1f} output tokens/s in batches, "
        f"{ours.token_rate:.1f} with continuous batching, "
        f"{ours.token_rate / batches.token_rate if batches.token_rate else 0:.2f} times as many"
    )
    if found.batches is None or found.ours is None or found.rate is None:
        console.print("batches sustained none of the tried rates")
        return
    console.print(
        f"highest tried rate that batches sustain: {found.rate:.2f} requests/s, "
        f"{found.fraction:.1f} of their rate at saturation; {found.batches.requests} requests",
        soft_wrap=True,
    )
    table = grid("", "ms", "mean", "p50", "p90", "p99", left=2)
    for row in (found.batches, found.ours):
        for name in TIMES:
            head = row.server if name == TIMES[0] else ""
            table.add_row(head, name.upper(), *cells(getattr(row, name)))
        table.add_section()
    console.print(table)


def print_long(console: Console, rows: Sequence[Row]) -> None:
    console.print(
        "[bold]A long prompt beside four streams[/bold]\n"
        "ITL of the streams, in total and during the long prompt's prefill; ms"
    )
    table = grid(
        "server",
        "others",
        "ITLs",
        "p50",
        "p90",
        "p99",
        "p99/p50",
        "beside: ITLs",
        "p50",
        "p99",
        "TTFT",
        left=2,
    )
    for row in rows:
        itl, beside = cells(row.itl)[1:], cells(row.beside)
        counts = [str(each.count) if each else "-" for each in (row.itl, row.beside)]
        around = [counts[1], beside[1], beside[3], cells(row.ttft)[1]]
        table.add_row(row.server, row.busy_word, counts[0], *itl, f"{row.ratio:.2f}", *around)
    console.print(table)


def print_idle(console: Console, found: Idle) -> None:
    cores = ", ".join(f"{100 * share:.1f} %" for share in found.cores or []) or "unknown"
    console.print(
        f"[bold]Idle servers[/bold]\nuse of a core by front end and engine: {cores}; then requests "
        "for one token, ms"
    )
    table = grid("from arrival", "mean", "p50", "p90", "p99")
    table.add_row("to the first step", *cells(found.begin))
    table.add_row("to the first token", *cells(found.ttft))
    console.print(table)


def print_prefix(console: Console, found: Prefix) -> None:
    console.print("[bold]A prompt with a cached beginning[/bold]\nmedian TTFT, ms")
    table = grid("server", "pairs", "first", "second")
    for server in dict.fromkeys(pair.server for pair in found.pairs):
        own = [pair for pair in found.pairs if pair.server == server]
        first, second = (Spread.of(getattr(p, name) for p in own) for name in ("first", "second"))
        table.add_row(server, str(len(own)), cells(first)[1], cells(second)[1])
    console.print(table)


def print_soak(console: Console, found: Soak) -> None:
    wrong = ", ".join(f"{name} {count}" for name, count in found.wrong.items())
    console.print(
        f"[bold]{found.requests:,} requests at saturation[/bold]\n"
        f"{found.hung_up} users disconnected; invalid requests: {wrong or 'none'}\n"
        f"{found.compared:,} answers compared with the quiet run: {len(found.differences)} differ"
        f"{_margins(found)}\n{_memory(found.samples)}",
        soft_wrap=True,
    )
    print_load(console, [found.figures])
    print_failed(console, [*found.failed, *found.taken, *found.left_over])


def _margins(found: Soak) -> str:
    if not found.differences:
        return ""
    widest = max(found.differences, key=lambda each: each.margin)
    return f", with a margin of at most {widest.margin:.2g} (token {widest.index})"


def _memory(samples: Sequence[Sample]) -> str:
    if not samples:
        return "resident memory: unknown for servers that were not started here"
    sizes = [sample.resident / 2**20 for sample in samples]
    return (
        f"resident memory: {min(sizes):,.0f} to {max(sizes):,.0f} MiB, {sizes[-1]:,.0f} at the end"
    )
