"""How much communication weighs in the time of steps, beside the paper's servers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from benchmarks.namespaces import show_rate

from .cells import Row

#: The paper's layers took so many times as long when all calls were remote.
PAPER_RATIO = 8.3


@dataclasses.dataclass(frozen=True)
class Weight:
    """Of communication, in a workload at one rate.

    Attributes:
        most: the policy with the largest share of remote calls; not all of them are, as they are
            where PAPER_RATIO was measured.
        best: the one whose steps take the least time per token.
    """

    most: Row
    best: Row

    @property
    def over_alone(self) -> float:
        """Seconds of `most`'s steps over those in which they compute, and wait for nobody.

        The steps are whole ones: what they take beside layers, to schedule and to make text, is in
        both.
        """
        return self.most.ratio("step_s", "computing_s")

    @property
    def all_remote(self) -> float:
        """`over_alone`, if communication grew in proportion from `most`'s remote calls to all; nan:
        it has none."""
        remote = self.most.average("remote")
        return 1 + (self.over_alone - 1) / remote if remote else math.nan

    @property
    def over_best(self) -> float:
        """Seconds of steps per token of `most` over those of `best`. Slower steps have more tokens
        in them, so that this is less than their communication alone would make of it."""
        return self.most.ratio("step_s", "tokens") / self.best.ratio("step_s", "tokens")

    @property
    def off(self) -> float:
        """How far `over_alone` is from PAPER_RATIO, as a factor's logarithm."""
        return abs(math.log(self.over_alone / PAPER_RATIO))

    def line(self) -> str:
        """For the terminal."""
        return (
            f"{self.most.workload}, links {show_rate(self.most.rate)}: {self.most.policy}, with "
            f"{self.most.average('remote'):.0%} of calls remote, takes {self.over_alone:.1f} times "
            f"as long as computing alone, in proportion {self.all_remote:.1f} times were all "
            f"remote, {self.over_best:.2f} times as long as {self.best.policy}"
        )

    def plain(self) -> dict[str, Any]:
        """For JSON."""
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
    """Of each workload and rate."""
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
    """Of each workload the one at whose rate communication weighs most like in the paper."""
    groups: dict[str, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(weight.most.workload, []).append(weight)
    return [min(group, key=lambda weight: weight.off) for group in groups.values()]
