"""The grouped expert FFN against one dense FFN per assignment."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.models import kernels_cpu
from dance_jax.models.config import Activation
from dance_jax.models.experts import ExpertFormat, Pool, block_rows, grouped_ffn, ragged_ffn
from dance_jax.models.layers import SILU, GatedMLP, matmul

D, F = 8, 12
#: Plain experts; gpt-oss's; one with the other activation.
KINDS = ((SILU, False), (Activation("clamped", 1.702, 1.5), True), (Activation("gelu"), False))


def make_format(kind: int = 0, d: int = D, f: int = F, dtype: str = "float32") -> ExpertFormat:
    return ExpertFormat(d, f, dtype, *KINDS[kind])


def make_pool(form: ExpertFormat, slots: int) -> Pool:
    rng = np.random.default_rng(slots)
    return tuple(
        jnp.asarray(rng.normal(size=(slots, *leaf.shape)), leaf.dtype)
        for leaf in form.leaves.values()
    )


def dense(form, pool, x_nd: np.ndarray, slot_nk: np.ndarray, weight_nk: np.ndarray) -> np.ndarray:
    """Float64, one assignment at a time."""
    leaves = dict(zip(form.leaves, (np.asarray(w, np.float64) for w in pool), strict=True))
    out = np.zeros(x_nd.shape)

    def product(x, part, slot):
        return x @ leaves[f"w_{part}"][slot] + (leaves[f"b_{part}"][slot] if form.bias else 0)

    for n, k in np.argwhere(slot_nk >= 0):
        slot, x = slot_nk[n, k], x_nd[n].astype(np.float64)
        gate, up = (product(x, part, slot) for part in ("gate", "up"))
        if form.activation.kind == "clamped":
            limit = form.activation.limit
            gate = np.minimum(gate, limit)
            hidden = gate / (1 + np.exp(-form.activation.alpha * gate))
            hidden = hidden * (np.clip(up, -limit, limit) + 1)
        elif form.activation.kind == "gelu":
            inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
            hidden = gate * (1 + np.tanh(inner)) / 2 * up
        else:
            hidden = gate / (1 + np.exp(-gate)) * up
        out[n] += weight_nk[n, k] * product(hidden, "down", slot)
    return out


@functools.cache
def compiled(kind: int, block: int | None):
    """The loop over blocks; None: the library's grouped product."""
    form = make_format(kind)
    if block is None:
        return jax.jit(functools.partial(ragged_ffn, form))
    return jax.jit(functools.partial(grouped_ffn, form, block=block))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    block=st.sampled_from([1, 4, 16, None]),
    absent=st.sampled_from([0.0, 0.5, 1.0]),
    skewed=st.booleans(),
    kind=st.integers(0, 2),
)
def test_equals_one_dense_ffn_per_assignment(seed, block, absent, skewed, kind):
    rng = np.random.default_rng(seed)
    form, (n, k) = make_format(kind), (23, 3)
    pool = make_pool(form, 5)
    x_nd = rng.normal(size=(n, D)).astype(np.float32)
    slot_nk = rng.integers(0, 1 if skewed else 5, (n, k)).astype(np.int32)
    slot_nk[rng.random((n, k)) < absent] = -1
    weight_nk = rng.random((n, k)).astype(np.float32)
    y_nd = compiled(kind, block)(pool, x_nd, slot_nk, weight_nk)
    assert y_nd.dtype == jnp.float32
    expected = dense(form, pool, x_nd, slot_nk, weight_nk)
    np.testing.assert_allclose(y_nd, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([1, 2, 23, 90]),
    sizes=st.sampled_from([(8, 12), (19, 5), (1, 1), (64, 33)]),
    slots=st.sampled_from([1, 5, 40]),
    absent=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    kind=st.integers(0, 2),
)
def test_in_cpp_it_is_the_same(expert_library, seed, rows, sizes, slots, absent, dtype, kind):
    assert kernels_cpu.usable() == (expert_library is not None)
    rng = np.random.default_rng(seed)
    form = make_format(kind, *sizes, dtype)
    pool = make_pool(form, slots)
    x_nd = jnp.asarray(rng.normal(size=(rows, sizes[0])), dtype)
    slot_nk = rng.integers(0, slots, (rows, 3)).astype(np.int32)
    slot_nk[rng.random((rows, 3)) < absent] = -1
    weight_nk = rng.random((rows, 3)).astype(np.float32)
    y_nd = form.ffn(pool, x_nd, slot_nk, weight_nk, slots)
    assert y_nd.dtype == jnp.float32
    expected = dense(form, pool, np.asarray(x_nd), slot_nk, weight_nk)
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
    form = make_format(0, *sizes, dtype)
    pool = make_pool(form, 1)
    for part, weight in zip((mlp.gate, mlp.up, mlp.down), pool, strict=True):
        part.weight[...] = weight[0]
    only = np.zeros((rows, 1), np.int32)
    expected = dense(form, pool, np.asarray(x_nd), only, np.ones((rows, 1)))
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
    rows = jnp.ones((2, D)), jnp.full((2, 3), -1), jnp.ones((2, 3))
    for kind in range(len(KINDS)):
        form = make_format(kind)
        pool = make_pool(form, 0)
        for y_nd in (
            grouped_ffn(form, pool, *rows, 4),
            ragged_ffn(form, pool, *rows),
            form.ffn(pool, *rows, 0),
        ):
            assert y_nd.shape == (2, D) and not y_nd.any()


def test_blocks_grow_with_the_rows_an_expert_gets():
    blocks = [block_rows(rows * 6, 64) for rows in (1, 8, 64, 128, 1024, 100_000)]
    assert blocks == sorted(blocks) and blocks[0] == 1 and blocks[-1] == 64
    # Most blocks are full: at least half of the rows an expert gets on average fit in one.
    assert all(
        block >= min(rows * 6 / 64, 64) / 2
        for block, rows in zip(blocks, (1, 8, 64, 128, 1024, 100_000), strict=True)
    )
