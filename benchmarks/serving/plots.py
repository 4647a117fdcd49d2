"""Plots of the results, as a PNG file."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dance_jax.bench.client import Answer
from dance_jax.bench.figures import first_token_s, gaps_s

from .memory import Sample
from .report import Results
from .static import Static

DPI = 110


def draw(names: Sequence[str], results: Results, path: pathlib.Path) -> None:
    """Draw a panel for each measured distribution; write no file if there is none."""
    panels: list[Callable[[Any], None]] = []
    if (answers := results.answers) is not None:
        panels += [lambda panel: _load(panel, names, answers, first_token_s, "TTFT")]
        panels += [lambda panel: _load(panel, names, answers, gaps_s, "ITL")]
    if (static := results.static) is not None:
        panels.append(lambda panel: _static(panel, static))
    if (soak := results.soak) is not None and soak.samples:
        panels.append(lambda panel: _memory(panel, soak.samples))
    if not panels:
        return
    save(panels, path)


def save(panels: Sequence[Callable[[Any], None]], path: pathlib.Path, width: float = 4.2) -> None:
    """Write a PNG file with panels side by side.

    Args:
        panels: functions that draw on the axes that they get.
        path: of the file.
        width: of a panel, in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), squeeze=False, figsize=(width * len(panels), 3.4), layout="constrained"
    )
    for panel, fill in zip(axes[0], panels, strict=True):
        fill(panel)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def _shares(panel: Any, lines: Mapping[str, Sequence[float]], title: str) -> None:
    """Plot the cumulative distribution of each line's times, given in seconds."""
    for name, seconds in lines.items():
        if seconds:
            values = np.sort(seconds) * 1e3
            panel.step(values, np.arange(1, len(values) + 1) / len(values), label=name)
    panel.set_xscale("log")
    panel.set(xlabel="ms", ylabel="share", title=title)
    panel.legend(fontsize="small", frameon=False)


def _load(
    panel: Any,
    names: Sequence[str],
    answers: Sequence[Answer],
    times: Callable[[list[Answer]], list[float]],
    title: str,
) -> None:
    own = {
        name: times([each for each in answers if each.complete and each.call.server == server])
        for server, name in enumerate(names)
    }
    _shares(panel, own, title)


def _static(panel: Any, found: Static) -> None:
    title = "TTFT" if found.rate is None else f"TTFT at {found.rate:.2f} requests/s"
    lines = {"one batch at a time": found.ttft_batches, "continuous": found.ttft_ours}
    _shares(panel, lines, title)


def _memory(panel: Any, samples: Sequence[Sample]) -> None:
    panel.plot([each.done for each in samples], [each.resident / 2**20 for each in samples])
    panel.set(xlabel="requests", ylabel="MiB", title="resident memory during the soak")
    panel.set_ylim(bottom=0)
