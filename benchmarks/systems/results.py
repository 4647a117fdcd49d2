"""Figures of all systems: ratios, tables and targets."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from benchmarks.namespaces import show_rate
from benchmarks.targets import Target
from dance_jax.bench.tables import grid, milliseconds

from .loads import Figures

#: Names of our system and of the systems that it is compared with.
OURS, STAR, OLD = "latency", "star", "old"
#: Minimum ratio of our speed to the star's, by (load, Mbps): of `decode` for one user, of `total`
#: for several.
SPEED = {
    ("1 user", 20): 0.8,
    ("1 user", 100): 0.6,
    ("1 user", 500): 0.6,
    ("3 users", 20): 1.6,
    ("3 users", 100): 1.1,
    ("3 users", 500): 0.9,
    ("12 users", 20): 1.6,
    ("12 users", 100): 1.5,
}
#: Maximum ratios of ours to the star's: of the long prompt's TTFT, by Mbps; and of the processor
#: time of one stream, as (Mbps, ratio).
LONG_TTFT = {20: 3.0, 100: 1.2}
PROCESSOR = (100, 2.0)
_MBPS = 1_000_000


@dataclasses.dataclass
class Cell:
    """Results of one load at one link rate in one format."""

    form: str
    #: Bits per second; None if links are not shaped.
    rate: int | None
    load: str
    #: Figures by system, in the order of the repetitions.
    figures: dict[str, list[Figures]]

    def median(self, system: str, of: Callable[[Figures], float]) -> float:
        """Return a system's median over the repetitions."""
        return statistics.median(map(of, self.figures[system]))

    def ratio(self, ours: str, other: str, of: Callable[[Figures], float]) -> float | None:
        """Return the median of the repetitions' ratios; None if a system was not measured."""
        if not self.figures.get(ours) or not self.figures.get(other):
            return None
        pairs = zip(self.figures[ours], self.figures[other], strict=False)
        return statistics.median(of(mine) / of(theirs) for mine, theirs in pairs)

    def speed(self, found: Figures) -> float:
        """Return the speed that counts for the load, in tokens/s: `decode` for one user."""
        return found.decode if self.load == "1 user" and found.decode else found.total

    @property
    def where(self) -> str:
        return f"{self.form}, {show_rate(self.rate)}, {self.load}"


def show(console: Console, cells: Sequence[Cell]) -> None:
    """Print a table of all figures and ratios, and the numbers of equal outputs."""
    table = grid(
        "format", "links", "load", "system", "decode", "total", "TTFT ms", "CPU ms", "kB",
        "speed/star", "CPU/star", "TTFT/star", "speed/old", left=4,
    )  # fmt: skip
    for cell in cells:
        head = [cell.form, show_rate(cell.rate), cell.load]
        for system, found in cell.figures.items():
            decode = None if found[0].decode is None else cell.median(system, _decode)
            ratios = [
                cell.ratio(system, STAR, cell.speed),
                cell.ratio(system, STAR, _cpu_s),
                cell.ratio(system, STAR, _ttft_s),
                cell.ratio(system, OLD, cell.speed),
            ]
            table.add_row(
                *head,
                system,
                "-" if decode is None else f"{decode:.1f}",
                f"{cell.median(system, lambda each: each.total):.1f}",
                milliseconds(cell.median(system, _ttft_s)),
                milliseconds(cell.median(system, _cpu_s)),
                f"{cell.median(system, lambda each: each.bytes) / 1e3:.0f}",
                *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            )
            head = ["", "", ""]
        table.add_section()
    console.print(table)
    for system, (equal, compared) in agreement(cells).items():
        console.print(
            f"float32 greedy outputs of {system} equal to those of {OURS}: {equal} of {compared}"
        )


def _decode(found: Figures) -> float:
    return found.decode or 0.0


def _cpu_s(found: Figures) -> float:
    return found.cpu_s


def _ttft_s(found: Figures) -> float:
    return found.ttft_s


def agreement(cells: Sequence[Cell]) -> dict[str, tuple[int, int]]:
    """Return the number of float32 outputs equal to ours, and of all, for each other system."""
    found: dict[str, tuple[int, int]] = {}
    for cell in cells:
        if cell.form != "float32" or OURS not in cell.figures:
            continue
        for system, theirs in cell.figures.items():
            if system == OURS:
                continue
            pairs = [
                mine == other
                for ours, others in zip(cell.figures[OURS], theirs, strict=False)
                for mine, other in zip(ours.outputs, others.outputs, strict=True)
            ]
            equal, compared = found.get(system, (0, 0))
            found[system] = equal + sum(pairs), compared + len(pairs)
    return found


def targets(cells: Sequence[Cell]) -> Iterator[Target]:
    """Yield the targets, which are ratios of our figures to the star's."""
    for cell in cells:
        mbps = None if cell.rate is None else cell.rate // _MBPS
        if (least := SPEED.get((cell.load, mbps or 0))) is not None:
            ratio = cell.ratio(OURS, STAR, cell.speed)
            yield Target(f"{cell.where}: speed over star", least, ratio, least=True)
        if cell.load == "prompt of 500" and mbps in LONG_TTFT:
            ratio = cell.ratio(OURS, STAR, _ttft_s)
            yield Target(f"{cell.where}: TTFT over star", LONG_TTFT[mbps], ratio)
        if cell.load == "1 user" and mbps == PROCESSOR[0]:
            ratio = cell.ratio(OURS, STAR, _cpu_s)
            yield Target(f"{cell.where}: processor time over star", PROCESSOR[1], ratio)


def plain(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the results for JSON, without the outputs."""
    return {
        "cells": [
            {
                "format": cell.form,
                "rate": cell.rate,
                "load": cell.load,
                "figures": {
                    system: [
                        {k: v for k, v in dataclasses.asdict(each).items() if k != "outputs"}
                        for each in found
                    ]
                    for system, found in cell.figures.items()
                },
            }
            for cell in cells
        ],
        "equal_outputs": agreement(cells),
    }
