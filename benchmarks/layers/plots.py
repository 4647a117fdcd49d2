"""Plots of the grid, as PNG files."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

from benchmarks.namespaces import show_rate

from .measure import Cell

PARTS = ("waiting", "moving", "collectives", "experts", "packing")


def draw(cells: Sequence[Cell], directory: pathlib.Path) -> list[pathlib.Path]:
    """Time, bytes and parts of the cells of one transport and wire dtype; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    rates = sorted({cell.rate for cell in cells}, key=lambda rate: rate or float("inf"))
    return [
        _lines(cells, rates, "ms per layer", lambda c: c.layer_s * 1e3, directory / "time.png"),
        _lines(
            [cell for cell in cells if cell.rate == rates[0]],
            rates[:1],
            "bytes over the bound",
            lambda cell: cell.ratio,
            directory / "bytes.png",
        ),
        _bars(cells, rates, directory / "parts.png"),
    ]


def _lines(
    cells: Sequence[Cell],
    rates: Sequence[int | None],
    label: str,
    value: Callable[[Cell], float | None],
    path: pathlib.Path,
) -> pathlib.Path:
    """Against tokens, a line per local share, a panel per rate."""
    from matplotlib import pyplot

    size = (3.2 * len(rates) + 1.2, 3.4)
    figure, panels = pyplot.subplots(1, len(rates), squeeze=False, sharey=True, figsize=size)
    for panel, rate in zip(panels[0], rates, strict=True):
        for share in sorted({cell.local_share for cell in cells}):
            line = sorted(
                (cell.tokens, y)
                for cell in cells
                if (cell.rate, cell.local_share) == (rate, share) and (y := value(cell)) is not None
            )
            if line:
                panel.plot(*zip(*line, strict=True), marker="o", markersize=3, label=f"{share:g}")
        panel.set(title=show_rate(rate), xlabel="tokens per device")
        panel.set_xscale("log", base=4)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.grid(alpha=0.3)
    panels[0][0].set(ylabel=label)
    if label.startswith("ms"):
        panels[0][0].set_yscale("log")
    panels[0][-1].legend(title="local share", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return path


def _bars(cells: Sequence[Cell], rates: Sequence[int | None], path: pathlib.Path) -> pathlib.Path:
    """Shares of a layer's time, at the least local share."""
    from matplotlib import pyplot

    share = min(cell.local_share for cell in cells)
    size = (3.2 * len(rates) + 1.2, 3.4)
    figure, panels = pyplot.subplots(1, len(rates), squeeze=False, sharey=True, figsize=size)
    for panel, rate in zip(panels[0], rates, strict=True):
        column = sorted(
            (cell for cell in cells if (cell.rate, cell.local_share) == (rate, share)),
            key=lambda cell: cell.tokens,
        )
        names, foot = [str(cell.tokens) for cell in column], [0.0] * len(column)
        for part in PARTS:
            totals = [sum(cell.critical_parts_s.values()) for cell in column]
            heights = [
                cell.critical_parts_s[part] / total
                for cell, total in zip(column, totals, strict=True)
            ]
            panel.bar(names, heights, bottom=foot, label=part)
            foot = [low + height for low, height in zip(foot, heights, strict=True)]
        panel.set(title=show_rate(rate), xlabel="tokens per device")
        panel.tick_params(axis="x", labelsize="small")
    panels[0][0].set(ylabel=f"share of time, local share {share:g}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", loc="center right")
    figure.tight_layout(rect=(0, 0, 1 - 1.2 / size[0], 1))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return path
