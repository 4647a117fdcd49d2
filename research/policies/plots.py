"""Results as PNG files."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dance_jax.placement.core import Placement

from .figures import Table
from .setups import Setup

PANELS = {
    "remote": "remote calls, share",
    "any_miss": "any miss, share",
    "transfers": "transfers per token",
    "busiest": "busiest server, states",
    "load": "busiest device of a layer",
    "device": "busiest device, all layers",
    "layer_time": "predicted layer time",
}
SWEPT = ("layer_time", "any_miss")
PICTURED = ("uniform", "dance", "optimal", "latency")
#: Inks of the first three servers: those that hold an expert together lie on each other.
INKS = np.array([[0.36, 0.68, 0.89], [0.95, 0.50, 0.48], [0.98, 0.83, 0.38]])
DPI = 110


def agg_pyplot() -> Any:
    """pyplot, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: pathlib.Path) -> pathlib.Path:
    """Writes a figure as a PNG file; returns the path."""
    figure.savefig(path, dpi=DPI)
    agg_pyplot().close(figure)
    return path


def _colours(policies: Sequence[str]) -> dict[str, Any]:
    """The same policy has the same colour in all plots of a run."""
    return {policy: f"C{n % 10}" for n, policy in enumerate(policies)}


def draw_figures(table: Table, path: pathlib.Path) -> pathlib.Path:
    """A panel for each column, a bar for each policy; a tick where a published figure is."""
    policies = [row.policy for row in table.rows]
    colours = _colours(policies)
    height = 1.3 + 0.3 * len(policies)
    figure, panels = agg_pyplot().subplots(
        1, len(PANELS), sharey=True, figsize=(2.2 * len(PANELS), height), layout="constrained"
    )
    ticked = False
    for panel, (column, label) in zip(panels, PANELS.items(), strict=True):
        values = [getattr(row, column) for row in table.rows]
        published = [table.setup.published.get(policy, {}).get(column) for policy in policies]
        panel.barh(policies, values, height=0.7, color=[colours[policy] for policy in policies])
        for n, (value, other) in enumerate(zip(values, published, strict=True)):
            right = value if other is None else max(value, other)
            panel.text(right + 0.03 * max(values), n, f"{value:.3f}", va="center", fontsize=7.5)
            if other is not None:
                ticked = True
                panel.plot([other] * 2, [n - 0.42, n + 0.42], color="black", linewidth=1.6)
        panel.set_title(label, fontsize="medium")
        panel.set_xlim(0, 1.22 * max(value for value in (*values, *published) if value))
        panel.tick_params(axis="x", labelsize="x-small")
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle(
        f"{table.setup.title}: unseen tokens, less is better"
        + (" (black: published)" if ticked else ""),
        fontsize="medium",
    )
    return save_figure(figure, path)


def draw_memory(tables: Sequence[Table], path: pathlib.Path) -> pathlib.Path:
    """Columns against memory, a line for each policy."""
    colours = _colours([row.policy for row in tables[0].rows])
    figure, panels = agg_pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, column in zip(panels, SWEPT, strict=True):
        for policy, colour in colours.items():
            found = [(table.setup.memory, table.row(policy)) for table in tables]
            line = [(memory, getattr(row, column)) for memory, row in found if row]
            panel.plot(*zip(*line, strict=True), "o-", ms=4, lw=1.5, color=colour, label=policy)
        memories = [table.setup.memory for table in tables]
        panel.set_xscale("log")
        panel.set_xticks(memories, [f"{memory:g}" for memory in memories])
        panel.minorticks_off()
        panel.set(xlabel="memory of all servers, copies of the model", ylabel=PANELS[column])
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small", frameon=False)
    return save_figure(figure, path)


def _mixed(held_n: np.ndarray) -> np.ndarray:
    """Inks on each other: float [..., 3] from bool [servers, ...]; white where there is none."""
    inks = INKS.reshape(len(INKS), *[1] * (held_n.ndim - 1), 3)
    return np.where(held_n[..., None], inks, 1.0).prod(0)


def by_favourite(setup: Setup) -> np.ndarray:
    """Experts of each layer by the server that calls them most, most called first: [l, e]."""
    calls_nle = setup.counts
    return np.lexsort((-calls_nle.max(0), calls_nle.argmax(0)), axis=-1)


def draw_holders(
    setup: Setup, placements: Mapping[str, Placement], path: pathlib.Path
) -> pathlib.Path | None:
    """Who holds what, an image for each of PICTURED that is there; None: not of three servers."""
    policies = [policy for policy in PICTURED if policy in placements]
    servers, layers, experts = setup.counts.shape
    if servers != len(INKS) or not policies:
        return None
    pyplot = agg_pyplot()
    figure, panels = pyplot.subplots(
        1,
        len(policies),
        squeeze=False,
        sharey=True,
        figsize=(2.6 * len(policies) + 0.4, 3.5),
        layout="constrained",
    )
    order_le = by_favourite(setup)
    for panel, policy in zip(panels[0], policies, strict=True):
        held_nle = np.take_along_axis(placements[policy].resident, order_le[None], axis=2)
        panel.imshow(_mixed(held_nle), aspect="auto", interpolation="nearest")
        panel.set_xticks(np.arange(experts + 1) - 0.5, minor=True)
        panel.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
        panel.grid(which="minor", color="white", linewidth=0.4)
        panel.tick_params(which="both", length=0, labelsize="x-small")
        panel.set_xticks([])
        panel.set_title(policy, fontsize="medium")
        panel.spines[:].set_visible(False)
    panels[0][0].set_ylabel("MoE layer", fontsize="small")
    sets = [s for size in (1, 2, 3) for s in itertools.combinations(range(servers), size)]
    patches = [
        pyplot.Rectangle((0, 0), 1, 1, color=_mixed(np.isin(range(servers), each))) for each in sets
    ]
    labels = [" + ".join(map(str, each)) for each in sets]
    title = (
        "experts of each layer by the server that calls them most, most called first; colour: "
        f"servers that hold an expert ({', '.join(map(str, setup.devices))} devices)"
    )
    figure.legend(
        patches,
        labels,
        title=title,
        ncols=len(sets),
        loc="outside lower center",
        fontsize="small",
        title_fontsize="small",
        frameon=False,
        handlelength=1.2,
    )
    return save_figure(figure, path)
