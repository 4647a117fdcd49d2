"""Targets: figures that a benchmark must reach, and whether it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Target:
    """One line of the verdict."""

    name: str
    limit: float
    #: The worst of the measured figures; None if none was measured.
    worst: float | None
    #: Where the worst figure was measured.
    where: str = ""
    #: True if more is better and `limit` is the minimum; False if `limit` is the maximum.
    least: bool = False

    @classmethod
    def of_worst(cls, name: str, limit: float, found: Iterable[tuple[float | None, str]]) -> Target:
        """Make a target of the highest of some figures, for a `limit` that is a maximum.

        Args:
            name: of the target.
            limit: the maximum.
            found: figures (None if not measured) and where each was measured.
        """
        known = [(value, where) for value, where in found if value is not None]
        # NaN is worse than any number, and `max` alone would depend on the order.
        value, where = max(known, key=lambda each: (each[0] != each[0], each), default=(None, ""))
        return cls(name, limit, value, where)

    @property
    def missed(self) -> bool:
        """Whether the figure misses the limit; NaN does."""
        # Negated, because comparisons with NaN are false.
        return self.worst is not None and not (
            self.worst >= self.limit if self.least else self.worst <= self.limit
        )

    def line(self) -> str:
        """Return the verdict, the target's name and the figure as one line of text."""
        if self.worst is None:
            return f"not measured  {self.name}"
        verdict = "MISSED" if self.missed else "reached"
        bound = "at least" if self.least else "at most"
        found = f"{_short(self.worst)} ({bound} {_short(self.limit)})"
        return f"{verdict:<14}{self.name}: {found}{', ' if self.where else ''}{self.where}"


def plain_targets(targets: Iterable[Target]) -> dict[str, list[dict[str, Any]]]:
    """Return the targets that were measured as an entry of a JSON file."""
    found = (target for target in targets if target.worst is not None)
    return {"targets": [dataclasses.asdict(each) | {"missed": each.missed} for each in found]}


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
