"""Estimates of link costs, from sums over calls that add up across processes."""

from __future__ import annotations

import math

from dance_jax.models.counters import Moved

#: `seconds_per_byte` needs at least this many calls, and a slope at least this many standard errors
#: above 0.
LEAST_CALLS, CERTAIN = 100, 4.0


def seconds_per_byte(moved: Moved) -> float | None:
    """Seconds per additional byte over a server's links, by least squares; None if unknown.

    The fit also has a fixed cost per call. The slope counts as known if it exceeds its standard
    error by far; it does not between servers on one machine, or if all calls have the same size.

    Args:
        moved: sums over all calls, or over the calls of some period.
    """
    free = moved.calls - 2
    if free < LEAST_CALLS:
        return None
    xx = moved.bytes_bytes - moved.bytes**2 / moved.calls
    xy = moved.bytes_seconds - moved.bytes * moved.seconds / moved.calls
    yy = moved.seconds_seconds - moved.seconds**2 / moved.calls
    if xx <= 0 or xy <= 0:
        return None
    slope = xy / xx
    scatter = math.sqrt(max(yy - slope * xy, 0.0) / free / xx)
    return slope if slope > CERTAIN * scatter else None


def seconds_per_call(moved: Moved, byte_s: float | None) -> float | None:
    """Mean seconds per call without the time for its bytes; None if there are too few calls.

    Args:
        moved: sums over calls.
        byte_s: seconds per byte, from `seconds_per_byte` or another source; None for 0.
    """
    if moved.calls < LEAST_CALLS:
        return None
    return max(moved.seconds - (byte_s or 0.0) * moved.bytes, 0.0) / moved.calls
