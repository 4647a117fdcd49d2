"""Figures that have to be reached, and whether they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Target:
    """One line of the verdict; worst: of all figures that it is about, None: there is none."""

    name: str
    limit: float
    worst: float | None
    where: str = ""
    #: More is better, and `limit` is the least; otherwise it is the most.
    least: bool = False

    @classmethod
    def of_worst(cls, name: str, limit: float, found: Iterable[tuple[float | None, str]]) -> Target:
        """The worst of figures, each with where it was found; None: not measured there."""
        known = [(value, where) for value, where in found if value is not None]
        value, where = max(known, default=(None, ""))
        return cls(name, limit, value, where)

    @property
    def missed(self) -> bool:
        # So that a figure that is no number misses too.
        return self.worst is not None and not (
            self.worst >= self.limit if self.least else self.worst <= self.limit
        )

    def line(self) -> str:
        """Verdict, name and figure."""
        if self.worst is None:
            return f"not measured  {self.name}"
        verdict = "MISSED" if self.missed else "reached"
        bound = "at least" if self.least else "at most"
        found = f"{_short(self.worst)} ({bound} {_short(self.limit)})"
        return f"{verdict:<14}{self.name}: {found}{', ' if self.where else ''}{self.where}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
