"""Plot of local share and latency over time, as a PNG file."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.live.watch import Watched
from benchmarks.serving.plots import save

from .results import Results

#: Points per line, regardless of a run's length; each is the mean over SMOOTH intervals.
POINTS, SMOOTH = 60, 3


def draw(results: Results, path: pathlib.Path) -> None:
    """Draw both panels of the section `shift`; write no file if it was not measured."""
    if (found := results.shift) is None:
        return
    runs = {"no migration": found.stay, "migration": found.move}
    if results.accumulate is not None:
        runs["nothing fades"] = results.accumulate
    panels: list[Callable[[Any], None]] = [
        lambda panel: _lines(panel, runs, found.plan.shift_s, _local, "local share"),
        lambda panel: _lines(panel, runs, found.plan.shift_s, _latency, "latency, s"),
    ]
    save(panels, path, width=6.0)


def _lines(
    panel: Any,
    runs: Mapping[str, Watched],
    shift_s: float,
    line: Callable[[Watched, np.ndarray], np.ndarray],
    label: str,
) -> None:
    """Draw a line for each run, its migrations in the same colour, and the shift in grey."""
    for name, run in runs.items():
        edges = np.linspace(0, run.samples[-1].at_s, POINTS + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        (drawn,) = panel.plot(middles, line(run, edges), label=name)
        for moment in run.moves_s:
            panel.axvline(moment, color=drawn.get_color(), linestyle=":")
    panel.axvline(shift_s, color="grey", linestyle="--", label="users change their task")
    panel.set(xlabel="s", ylabel=label)
    panel.set_ylim(bottom=0)
    panel.legend(fontsize="small", frameon=False)


def _windows(edges: np.ndarray) -> list[tuple[float, float]]:
    """Return the smoothing window (begin, end) around each interval, in seconds."""
    last = len(edges) - 1
    return [
        (edges[max(0, n - SMOOTH // 2)], edges[min(last, n + 1 + SMOOTH // 2)]) for n in range(last)
    ]


def _local(run: Watched, edges: np.ndarray) -> np.ndarray:
    return np.array([1 - run.remote_share(*window) for window in _windows(edges)])


def _latency(run: Watched, edges: np.ndarray) -> np.ndarray:
    """Return the mean latency of the requests due in each window; NaN if there are none."""
    due_s = np.array([a.due_s for a in run.answers if a.complete])
    taken_s = np.array([a.end_s - a.due_s for a in run.answers if a.complete])
    means = []
    for begin, end in _windows(edges):
        within = (due_s >= begin) & (due_s < end)
        means.append(taken_s[within].mean() if within.any() else np.nan)
    return np.array(means)
