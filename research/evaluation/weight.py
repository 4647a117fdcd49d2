"""How much communication weighs in the time of steps, compared with the paper's servers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from benchmarks.namespaces import show_rate

from .cells import Row

#: How many times as long the paper's layers took when all calls were remote.
PAPER_RATIO = 8.3


@dataclasses.dataclass(frozen=True)
class Weight:
    """The weight of communication in a workload at one rate.

    Attributes:
        most: the policy with the largest share of remote calls; for PAPER_RATIO all were remote.
        best: the policy whose steps take the least time per token.
    """

    most: Row
    best: Row

    @property
    def over_alone(self) -> float:
        """Seconds of `most`'s steps over their seconds of computing.

        Both include what steps take besides layers: scheduling and text.
        """
        return self.most.ratio("step_s", "computing_s")

    @property
    def all_remote(self) -> float:
        """`over_alone` if all calls were remote and communication grew in proportion; nan if `most`
        has no remote calls."""
        remote = self.most.average("remote")
        return 1 + (self.over_alone - 1) / remote if remote else math.nan

    @property
    def over_best(self) -> float:
        """Seconds of steps per token of `most` over those of `best`.

        Slower steps have more tokens in them, which makes this ratio smaller.
        """
        return self.most.ratio("step_s", "tokens") / self.best.ratio("step_s", "tokens")

    @property
    def off(self) -> float:
        """The distance of `over_alone` from PAPER_RATIO: the absolute logarithm of their ratio."""
        return abs(math.log(self.over_alone / PAPER_RATIO))

    def line(self) -> str:
        """A line for the terminal."""
        return (
            f"{self.most.workload}, links {show_rate(self.most.rate)}: {self.most.policy}, with "
            f"{self.most.average('remote'):.0%} of calls remote, takes {self.over_alone:.1f} times "
            f"as long as computing alone (in proportion {self.all_remote:.1f} times if all calls "
            f"were remote), and {self.over_best:.2f} times as long as {self.best.policy}"
        )

    def plain(self) -> dict[str, Any]:
        """The figures for JSON."""
        return {
            "workload": self.most.workload,
            "rate": self.most.rate,
            "most_remote": self.most.policy,
            "remote": self.most.average("remote"),
            "over_alone": self.over_alone,
            "all_remote": self.all_remote,
            "best": self.best.policy,
            "over_best": self.over_best,
            "paper": PAPER_RATIO,
        }


def weights_of(rows: Iterable[Row]) -> list[Weight]:
    """The weight of each workload and rate."""
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.rate), []).append(row)
    return [
        Weight(
            most=max(group, key=lambda row: row.average("remote")),
            best=min(group, key=lambda row: row.ratio("step_s", "tokens")),
        )
        for group in groups.values()
    ]


def nearest(weights: Iterable[Weight]) -> list[Weight]:
    """For each workload, the weight that is nearest to the paper's."""
    groups: dict[str, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(weight.most.workload, []).append(weight)
    return [min(group, key=lambda weight: weight.off) for group in groups.values()]
