"""The grouped expert FFN against one dense FFN per assignment."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.models.experts import Pool, block_rows, grouped_ffn

D, F = 8, 12


def make_pool(slots: int) -> Pool:
    rng = np.random.default_rng(slots)
    shapes = (slots, D, F), (slots, D, F), (slots, F, D)
    return Pool(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))


def dense(pool: Pool, x_nd: np.ndarray, slot_nk: np.ndarray, weight_nk: np.ndarray) -> np.ndarray:
    """Float64, one assignment at a time."""
    w_gate, w_up, w_down = (np.asarray(w, np.float64) for w in pool)
    out = np.zeros(x_nd.shape)
    for n, k in np.argwhere(slot_nk >= 0):
        slot, x = slot_nk[n, k], x_nd[n].astype(np.float64)
        gate = x @ w_gate[slot]
        hidden = gate / (1 + np.exp(-gate)) * (x @ w_up[slot])
        out[n] += weight_nk[n, k] * (hidden @ w_down[slot])
    return out


@functools.cache
def compiled(block: int):
    return jax.jit(functools.partial(grouped_ffn, block=block))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    block=st.sampled_from([1, 4, 16]),
    absent=st.sampled_from([0.0, 0.5, 1.0]),
    skewed=st.booleans(),
)
def test_equals_one_dense_ffn_per_assignment(seed, block, absent, skewed):
    rng = np.random.default_rng(seed)
    pool, (n, k) = make_pool(5), (23, 3)
    x_nd = rng.normal(size=(n, D)).astype(np.float32)
    slot_nk = rng.integers(0, 1 if skewed else 5, (n, k)).astype(np.int32)
    slot_nk[rng.random((n, k)) < absent] = -1
    weight_nk = rng.random((n, k)).astype(np.float32)
    y_nd = compiled(block)(pool, x_nd, slot_nk, weight_nk)
    assert y_nd.dtype == jnp.float32
    np.testing.assert_allclose(y_nd, dense(pool, x_nd, slot_nk, weight_nk), rtol=1e-4, atol=1e-4)


def test_a_device_without_slots_adds_nothing():
    y_nd = grouped_ffn(make_pool(0), jnp.ones((2, D)), jnp.full((2, 3), -1), jnp.ones((2, 3)), 4)
    assert y_nd.shape == (2, D) and not y_nd.any()


def test_blocks_grow_with_the_rows_an_expert_gets():
    blocks = [block_rows(rows * 6, 64) for rows in (1, 8, 64, 128, 1024, 100_000)]
    assert blocks == sorted(blocks) and blocks[0] == 1 and blocks[-1] == 64
    # Most blocks are full: at least half of the rows an expert gets on average fit in one.
    assert all(
        block >= min(rows * 6 / 64, 64) / 2
        for block, rows in zip(blocks, (1, 8, 64, 128, 1024, 100_000), strict=True)
    )
