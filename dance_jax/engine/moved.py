"""How long what crosses links takes, as sums that add up over messages and processes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

#: `seconds_per_byte` says nothing of fewer calls, or where the slope is not so many standard errors
#: above 0.
LEAST_CALLS, CERTAIN = 100, 4.0


@dataclasses.dataclass(frozen=True)
class Moved:
    """Sums over calls that moved bytes, for the line of their seconds over their bytes."""

    calls: float = 0.0
    seconds: float = 0.0
    bytes: float = 0.0
    bytes_bytes: float = 0.0
    bytes_seconds: float = 0.0
    seconds_seconds: float = 0.0

    def __sub__(self, before: Moved) -> Moved:
        """The calls since then."""
        ours, theirs = dataclasses.astuple(self), dataclasses.astuple(before)
        return Moved(*(a - b for a, b in zip(ours, theirs, strict=True)))


def seconds_per_byte(kinds: Sequence[Moved]) -> float | None:
    """What a byte more takes through a server's links, by least squares; None: not known.

    Every kind of call has its own fixed part, all have one slope. It is known where it stands out
    of its own scatter: between servers of one machine, or where all calls are of a size, it does
    not.

    Args:
        kinds: the calls of each, or what they grew by over some time.
    """
    xx = xy = yy = 0.0
    free = -1
    for each in kinds:
        if each.calls == 0:
            continue
        xx += each.bytes_bytes - each.bytes**2 / each.calls
        xy += each.bytes_seconds - each.bytes * each.seconds / each.calls
        yy += each.seconds_seconds - each.seconds**2 / each.calls
        free += each.calls - 1
    if free < LEAST_CALLS or xx <= 0 or xy <= 0:
        return None
    slope = xy / xx
    scatter = math.sqrt(max(yy - slope * xy, 0.0) / free / xx)
    return slope if slope > CERTAIN * scatter else None
