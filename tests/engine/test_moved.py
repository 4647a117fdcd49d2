"""What a byte takes, by the times of calls of many sizes."""

from __future__ import annotations

import numpy as np
import pytest

from dance_jax.engine.moved import Moved, seconds_per_byte


def moved(sizes: np.ndarray, seconds: np.ndarray) -> Moved:
    sums = (seconds, sizes, sizes * sizes, sizes * seconds, seconds * seconds)
    return Moved(len(sizes), *(float(each.sum()) for each in sums))


def kinds(byte_s: float, noise_s: float, calls: int = 400) -> list[Moved]:
    """Of different sizes and fixed parts on one link."""
    rng = np.random.default_rng(0)
    found = []
    for fixed_s, largest in ((1e-3, 20_000), (5e-3, 90_000)):
        sizes = rng.integers(100, largest, calls).astype(float)
        seconds = fixed_s + byte_s * sizes + np.abs(rng.normal(0, noise_s, calls))
        found.append(moved(sizes, seconds))
    return found


def test_the_slope_of_time_over_bytes_is_found():
    assert seconds_per_byte(kinds(1e-8, 0.0)) == pytest.approx(1e-8, rel=1e-6)
    assert seconds_per_byte(kinds(1e-8, 1e-4)) == pytest.approx(1e-8, rel=0.05)
    (early, _), (late, other) = kinds(1e-8, 1e-4), kinds(1e-8, 1e-4, 900)
    assert seconds_per_byte([late - early, other]) == pytest.approx(1e-8, rel=0.1)


def test_an_uncertain_slope_is_not_known():
    assert seconds_per_byte(kinds(1e-11, 1e-3)) is None, "lost in the noise"
    assert seconds_per_byte(kinds(1e-8, 0.0, calls=20)) is None, "few calls"
    same = moved(np.full(400, 1e4), np.full(400, 1e-3))
    assert seconds_per_byte([same, Moved()]) is None, "all of a size"
    assert seconds_per_byte([]) is None
