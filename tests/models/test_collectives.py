"""Bytes of the collectives' messages; tests/cluster sends them between three processes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.models.collectives import CHUNKS, LADDER, wire_bytes


def sent(rows: np.ndarray, first: int, row: int, reply: int) -> np.ndarray:
    return np.asarray(wire_bytes(jnp.asarray(rows, jnp.int32), jnp.int32(first), row, reply))


@settings(deadline=None)
@given(st.lists(st.integers(0, 500), min_size=9, max_size=9), st.sampled_from(LADDER))
def test_bytes_are_at_least_the_bound_and_little_more(counts, first):
    rows = np.array(counts).reshape(3, 3) * (1 - np.eye(3, dtype=int))
    found = sent(rows, first, 260, 200)
    bound = rows * 260 + rows.T * 200
    assert (found >= bound).all()
    assert (found - bound <= (LADDER[-1] + CHUNKS[-1]) * (260 + 200) + 16).all()
    assert not np.diag(found).any()


def test_a_header_and_whole_chunks():
    rows = np.zeros((3, 3), int)
    rows[0, 2] = 21
    found = sent(rows, 0, 260, 200)
    assert found[0, 1] == 16, "four numbers"
    # 21 rows become 24 in chunks of 4, in both directions.
    assert found[0, 2] == 16 + 24 * 260
    assert found[2, 0] == 16 + 24 * 200
