"""Figures of all systems, their ratios, tables, and what has to be reached."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from benchmarks.namespaces import show_rate
from benchmarks.serving.tables import grid, milliseconds
from benchmarks.targets import Target

from .loads import Figures

#: Ours, and what it is compared with.
OURS, STAR, OLD = "latency", "star", "old"
#: Least ratio of ours to the star's: (load, rate) -> of `decode` for one user, of `total` for more.
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
#: Most of ours over the star's: TTFT of the long prompt by rate; processor time of one stream.
LONG_TTFT = {20: 3.0, 100: 1.2}
PROCESSOR = (100, 2.0)
_MBPS = 1_000_000


@dataclasses.dataclass
class Cell:
    """A load at a rate in a format: figures of each system, in the order of the repetitions."""

    form: str
    #: Bits per second; None: links are not shaped.
    rate: int | None
    load: str
    figures: dict[str, list[Figures]]

    def median(self, system: str, of: Callable[[Figures], float]) -> float:
        """Over repetitions."""
        return statistics.median(map(of, self.figures[system]))

    def ratio(self, ours: str, other: str, of: Callable[[Figures], float]) -> float | None:
        """Median of the repetitions' ratios; None: one of them was not measured."""
        if not self.figures.get(ours) or not self.figures.get(other):
            return None
        pairs = zip(self.figures[ours], self.figures[other], strict=False)
        return statistics.median(of(mine) / of(theirs) for mine, theirs in pairs)

    def speed(self, found: Figures) -> float:
        """What the load's users are served by: tokens/s."""
        return found.decode if self.load == "1 user" and found.decode else found.total

    @property
    def where(self) -> str:
        return f"{self.form}, {show_rate(self.rate)}, {self.load}"


def show(console: Console, cells: Sequence[Cell]) -> None:
    """A table of all figures, ratios of policies of ours to others, and equal outputs."""
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
            f"Greedy outputs in float32 equal to {OURS}'s: {system} {equal} of {compared}"
        )


def _decode(found: Figures) -> float:
    return found.decode or 0.0


def _cpu_s(found: Figures) -> float:
    return found.cpu_s


def _ttft_s(found: Figures) -> float:
    return found.ttft_s


def agreement(cells: Sequence[Cell]) -> dict[str, tuple[int, int]]:
    """Of each other system: float32 outputs that equal ours, of how many."""
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
    """What has to be reached over the star."""
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
    """For JSON; outputs are left out."""
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
