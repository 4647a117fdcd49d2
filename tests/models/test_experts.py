"""The grouped expert FFN against one dense FFN per assignment."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.models import kernels_cpu
from dance_jax.models.experts import Pool, block_rows, expert_ffn, grouped_ffn, ragged_ffn
from dance_jax.models.layers import GatedMLP, matmul

D, F = 8, 12


def make_pool(slots: int, d: int = D, f: int = F, dtype: str = "float32") -> Pool:
    rng = np.random.default_rng(slots)
    shapes = (slots, d, f), (slots, d, f), (slots, f, d)
    return Pool(*(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes))


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
def compiled(block: int | None):
    """The loop over blocks; None: the library's grouped product."""
    return jax.jit(functools.partial(grouped_ffn, block=block) if block else ragged_ffn)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    block=st.sampled_from([1, 4, 16, None]),
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


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([1, 2, 23, 90]),
    sizes=st.sampled_from([(8, 12), (19, 5), (1, 1), (64, 33)]),
    slots=st.sampled_from([1, 5, 40]),
    absent=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_in_cpp_it_is_the_same(expert_library, seed, rows, sizes, slots, absent, dtype):
    assert kernels_cpu.usable() == (expert_library is not None)
    rng = np.random.default_rng(seed)
    pool = make_pool(slots, *sizes, dtype)
    x_nd = jnp.asarray(rng.normal(size=(rows, sizes[0])), dtype)
    slot_nk = rng.integers(0, slots, (rows, 3)).astype(np.int32)
    slot_nk[rng.random((rows, 3)) < absent] = -1
    weight_nk = rng.random((rows, 3)).astype(np.float32)
    y_nd = expert_ffn(pool, x_nd, slot_nk, weight_nk, slots)
    assert y_nd.dtype == jnp.float32
    expected = dense(pool, np.asarray(x_nd), slot_nk, weight_nk)
    # in JAX the hidden activations are rounded to the dtype
    exact = expert_library is not None or dtype == "float32"
    tolerance = (1e-4 if exact else 3e-2) * (1 + np.abs(expected).max())
    np.testing.assert_allclose(y_nd, expected, rtol=0, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([1, 2, 3, 7, 12, 61]),
    sizes=st.sampled_from([(8, 12), (19, 5), (1, 1), (64, 33), (40, 300)]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_plain_products_in_cpp(expert_library, seed, rows, sizes, dtype):
    """`matmul` and `GatedMLP` of the trunk; without a compiler XLA's own."""
    rng = np.random.default_rng(seed)
    x_nd, w_df = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((rows, sizes[0]), sizes))
    expected = np.asarray(x_nd, np.float64) @ np.asarray(w_df, np.float64)
    found = matmul(x_nd, w_df)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * (1 + np.abs(expected).max()))
    mlp = GatedMLP(*sizes, jnp.dtype(dtype))
    pool = make_pool(1, *sizes, dtype)
    for part, weight in zip((mlp.gate, mlp.up, mlp.down), pool, strict=True):
        part.weight[...] = weight[0]
    only = np.zeros((rows, 1), np.int32)
    expected = dense(pool, np.asarray(x_nd), only, np.ones((rows, 1)))
    exact = expert_library is not None or dtype == "float32"
    tolerance = (1e-4 if exact else 3e-2) * (1 + np.abs(expected).max())
    np.testing.assert_allclose(mlp(x_nd), expected, rtol=0, atol=tolerance)


def test_without_a_compiler_there_is_no_library(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler -pipe")
    assert kernels_cpu.build(tmp_path) is None
    assert "no-such-compiler" in caplog.text
    monkeypatch.setenv("CXX", "false")
    assert kernels_cpu.build(tmp_path) is None
    assert "false failed" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_device_without_slots_adds_nothing(expert_library):
    y_nd = grouped_ffn(make_pool(0), jnp.ones((2, D)), jnp.full((2, 3), -1), jnp.ones((2, 3)), 4)
    assert y_nd.shape == (2, D) and not y_nd.any()
    y_nd = ragged_ffn(make_pool(0), jnp.ones((2, D)), jnp.full((2, 3), -1), jnp.ones((2, 3)))
    assert y_nd.shape == (2, D) and not y_nd.any()
    y_nd = expert_ffn(make_pool(0), jnp.ones((2, D)), jnp.full((2, 3), -1), jnp.ones((2, 3)), 0)
    assert y_nd.shape == (2, D) and not y_nd.any()


def test_blocks_grow_with_the_rows_an_expert_gets():
    blocks = [block_rows(rows * 6, 64) for rows in (1, 8, 64, 128, 1024, 100_000)]
    assert blocks == sorted(blocks) and blocks[0] == 1 and blocks[-1] == 64
    # Most blocks are full: at least half of the rows an expert gets on average fit in one.
    assert all(
        block >= min(rows * 6 / 64, 64) / 2
        for block, rows in zip(blocks, (1, 8, 64, 128, 1024, 100_000), strict=True)
    )
