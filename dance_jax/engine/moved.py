"""How long what crosses links takes, as sums that add up over messages and processes."""

from __future__ import annotations

import math

from dance_jax.models.counters import Moved

#: `seconds_per_byte` says nothing of fewer calls, or where the slope is not so many standard errors
#: above 0.
LEAST_CALLS, CERTAIN = 100, 4.0


def seconds_per_byte(moved: Moved) -> float | None:
    """What a byte more takes through a server's links, by least squares; None: not known.

    Calls have a fixed part too. The slope is known where it stands out of its own scatter: between
    servers of one machine, or where all calls are of a size, it does not.

    Args:
        moved: the calls, or those of some time.
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
    """Mean seconds of a call without those of its bytes; None if there were too few calls.

    Args:
        moved: what calls moved.
        byte_s: seconds of a byte, e.g. from `seconds_per_byte`; None: bytes take no time.
    """
    if moved.calls < LEAST_CALLS:
        return None
    return max(moved.seconds - (byte_s or 0.0) * moved.bytes, 0.0) / moved.calls
