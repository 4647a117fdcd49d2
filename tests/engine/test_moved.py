"""Seconds per byte, estimated from the times of calls of many sizes."""

from __future__ import annotations

import numpy as np
import pytest

from dance_jax.engine.moved import seconds_per_byte, seconds_per_call
from dance_jax.models.counters import Moved


def moved(sizes: np.ndarray, seconds: np.ndarray) -> Moved:
    sums = (seconds, sizes, sizes * sizes, sizes * seconds, seconds * seconds)
    return Moved(len(sizes), *(float(each.sum()) for each in sums))


def calls(byte_s: float, noise_s: float, count: int = 800) -> Moved:
    """Calls of different sizes over one link."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 90_000, count).astype(float)
    seconds = 5e-3 + byte_s * sizes + np.abs(rng.normal(0, noise_s, count))
    return moved(sizes, seconds)


def test_the_slope_of_time_over_bytes_is_found():
    assert seconds_per_byte(calls(1e-8, 0.0)) == pytest.approx(1e-8, rel=1e-6)
    early, late = calls(1e-8, 1e-4), calls(1e-8, 1e-4, 1800)
    assert seconds_per_byte(early) == pytest.approx(1e-8, rel=0.05)
    assert seconds_per_byte(late - early) == pytest.approx(1e-8, rel=0.1)


def test_an_uncertain_slope_is_not_known():
    assert seconds_per_byte(calls(1e-11, 1e-3)) is None, "lost in the noise"
    assert seconds_per_byte(calls(1e-8, 0.0, count=40)) is None, "few calls"
    assert seconds_per_byte(moved(np.full(400, 1e4), np.full(400, 1e-3))) is None, "all of a size"
    assert seconds_per_byte(Moved()) is None


def test_what_a_call_takes_beside_its_bytes():
    known = calls(1e-8, 0.0)
    assert seconds_per_call(known, 1e-8) == pytest.approx(5e-3, rel=1e-6)
    assert seconds_per_call(known, None) == pytest.approx(known.seconds / known.calls)
    assert seconds_per_call(known, 1.0) == 0.0, "never less"
    assert seconds_per_call(calls(1e-8, 0.0, count=40), 1e-8) is None, "few calls"
