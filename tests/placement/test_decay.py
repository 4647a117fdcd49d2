"""Counts that fade."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.config import UserError
from dance_jax.placement.decay import DecayedCounts


def test_half_is_left_after_a_half_life():
    counts = DecayedCounts(10.0)
    assert counts.value(5.0) == 0
    counts.add(np.array([[8, 0], [4, 2]]), 100.0)
    assert counts.value(100.0).tolist() == [[8, 0], [4, 2]]
    np.testing.assert_allclose(counts.value(110.0), [[4, 0], [2, 1]])
    counts.add(np.array([[0, 1], [0, 0]]), 120.0)
    np.testing.assert_allclose(counts.value(130.0), [[1, 0.5], [0.5, 0.25]])


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 1000)), min_size=1, max_size=8),
    st.sampled_from([None, 0.5, 30.0]),
)
def test_the_value_is_the_sum_of_all_that_faded(steps, half_life):
    counts, now, times = DecayedCounts(half_life), 0.0, []
    for wait, added in steps:
        now += wait
        times.append((now, added))
        counts.add(np.array([added]), now)
    end = now + 7.0
    share = [1.0 if half_life is None else 0.5 ** ((end - time) / half_life) for time, _ in times]
    want = sum(left * added for left, (_, added) in zip(share, times, strict=True))
    np.testing.assert_allclose(counts.value(end), [want], rtol=1e-9, atol=1e-200)


def test_a_clock_that_goes_back_adds_nothing_to_what_was():
    counts = DecayedCounts(10.0)
    counts.add(np.array([4.0]), 50.0)
    counts.add(np.array([4.0]), 40.0)
    assert counts.value(30.0) == 8.0 and counts.value(60.0) == 4.0


def test_malformed():
    for half_life in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="half-life"):
            DecayedCounts(half_life)
    counts = DecayedCounts(None)
    counts.add(np.ones(2), 0.0)
    with pytest.raises(ValueError, match="to add to"):
        counts.add(np.ones(3), 1.0)
    with pytest.raises(ValueError, match="at least 0"):
        counts.add(-np.ones(2), 1.0)
