"""Results as PNG files."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Sequence

from research.policies.plots import agg_pyplot, save_figure

from .runs import Run

#: Line styles of policies, in turn.
STYLES = ("-", "--", ":", "-.")


def draw_sweep(runs: Sequence[Run], path: pathlib.Path) -> None:
    """Draws mean latency against devices: a row for each way of serving, a panel for each interval.

    Colours are bandwidths, line styles are policies.
    """
    ways = list(dict.fromkeys(run.way for run in runs))
    intervals = sorted({run.interval_s for run in runs})
    rates = sorted({run.bandwidth for run in runs})
    policies = list(dict.fromkeys(run.policy for run in runs))
    figure, panels = agg_pyplot().subplots(
        len(ways),
        len(intervals),
        squeeze=False,
        sharex=True,
        sharey="row",
        figsize=(3.2 * len(intervals) + 1.6, 2.7 * len(ways) + 0.4),
        layout="constrained",
    )
    for row, way in zip(panels, ways, strict=True):
        for panel, interval in zip(row, intervals, strict=True):
            for colour, rate in enumerate(rates):
                for style, policy in zip(itertools.cycle(STYLES), policies, strict=False):
                    key = (way, interval, rate, policy)
                    line = [
                        (run.devices, run.mean)
                        for run in runs
                        if (run.way, run.interval_s, run.bandwidth, run.policy) == key
                    ]
                    label = f"{rate / 1e6:g} Mbps, {policy}"
                    panel.plot(
                        *zip(*line, strict=True), f"o{style}", ms=3, color=f"C{colour}", label=label
                    )
            panel.set_title(f"{way}, every {interval:g} s", fontsize="small")
            panel.set_xscale("log", base=2)
            devices = sorted({run.devices for run in runs})
            panel.set_xticks(devices, [str(each) for each in devices])
            panel.set_yscale("log")
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("mean latency, s")
    for panel in panels[-1]:
        panel.set_xlabel("devices")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small", frameon=False)
    save_figure(figure, path)


def draw_ways(title: str, runs: Sequence[Run], path: pathlib.Path) -> None:
    """Draws mean latency of each policy, a bar for each way of serving."""
    ways = list(dict.fromkeys(run.way for run in runs))
    policies = list(dict.fromkeys(run.policy for run in runs))
    figure, panel = agg_pyplot().subplots(
        figsize=(7, 1.4 + 0.5 * len(policies)), layout="constrained"
    )
    height = 0.8 / len(ways)
    for number, way in enumerate(ways):
        mean = {run.policy: run.mean for run in runs if run.way == way}
        places = [n + number * height for n in range(len(policies))]
        panel.barh(places, [mean[policy] for policy in policies], height=height, label=way)
    panel.set_yticks([n + 0.4 - height / 2 for n in range(len(policies))], policies)
    panel.invert_yaxis()
    panel.set_xlabel("mean latency, s")
    panel.set_title(title, fontsize="medium")
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small", frameon=False)
    save_figure(figure, path)
