"""The grouped expert FFN against one dense FFN per assignment."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.models import native
from dance_jax.models.config import Activation
from dance_jax.models.experts import ExpertFormat, block_rows, grouped_ffn, ragged_ffn
from dance_jax.models.formats import WeightFormat
from dance_jax.models.kernels_cpu import NativePool
from dance_jax.models.layers import SILU, GatedMLP
from dance_jax.models.rounding import ROUNDED

D, F = 8, 12
HALF = WeightFormat("bfloat16")
Kept = tuple[WeightFormat, WeightFormat, WeightFormat]
#: Plain experts; experts of gpt-oss; experts with the third activation.
KINDS = ((SILU, False), (Activation("clamped", 1.702, 1.5), True), (Activation("gelu"), False))


#: Formats of gate, up and down.
MIXED = (ROUNDED["int4"], ROUNDED["int4"], ROUNDED["int8"])


def make_format(
    kind: int = 0, d: int = D, f: int = F, dtype: str = "float32", kept: Kept | None = None
) -> ExpertFormat:
    kept = kept or (WeightFormat(dtype),) * 3
    kept = tuple(each if each.fits(d) and each.fits(f) else HALF for each in kept)
    return ExpertFormat(d, f, *kept, *KINDS[kind])


def make_experts(form: ExpertFormat, slots: int) -> list[dict[str, np.ndarray]]:
    """Experts as arrays by leaf name."""
    rng = np.random.default_rng(slots)
    experts = []
    for _ in range(slots):
        own = {}
        for name, (kept, *shape) in form.matrices.items():
            plain = dataclasses.replace(kept, offset=False)
            arrays = plain.quantise(rng.normal(size=shape).astype(np.float32))
            if kept.offset:
                scale = arrays["scale"]
                arrays["offset"] = rng.normal(size=scale.shape).astype(scale.dtype)
            own |= {f"{name}.{array}": values for array, values in arrays.items()}
        for name, leaf in form.leaves.items():
            if name not in own:
                own[name] = rng.normal(size=leaf.shape).astype(np.float32)
        experts.append(own)
    return experts


def make_pool(form: ExpertFormat, slots: int) -> tuple[jax.Array, ...]:
    experts = make_experts(form, slots)
    return tuple(
        jnp.stack([each[name] for each in experts])
        if experts
        else jnp.zeros((0, *leaf.shape), leaf.dtype)
        for name, leaf in form.leaves.items()
    )


def native_pool(form: ExpertFormat, slots: int) -> NativePool:
    """A pool with the same experts in the library's memory."""
    forms = (form.gate, form.up, form.down)
    pool = NativePool(form.d, form.f, form.activation, forms, form.bias, slots)
    for slot, own in enumerate(make_experts(form, slots)):
        pool.put(slot, slot, [own[name] for name in form.leaves])
    return pool


def dense(form, pool, x_nd: np.ndarray, slot_nk: np.ndarray, weight_nk: np.ndarray) -> np.ndarray:
    """Reference in float64, one assignment at a time."""
    leaves = dict(zip(form.leaves, map(np.asarray, pool), strict=True))
    out = np.zeros(x_nd.shape)

    def product(x, part, slot):
        kept, d_in, _ = form.matrices[f"w_{part}"]
        arrays = {
            name.partition(".")[2]: leaf[slot]
            for name, leaf in leaves.items()
            if name.startswith(f"w_{part}.")
        }
        found = x @ kept.dequantise(arrays, d_in).astype(np.float64)
        return found + (leaves[f"b_{part}"][slot] if form.bias else 0)

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
def lowered(kind: int, block: int | None):
    """The loop over blocks of `block` rows; JAX's grouped product if `block` is None."""
    form = make_format(kind)
    if block is None:
        return jax.jit(functools.partial(ragged_ffn, form))
    return jax.jit(functools.partial(grouped_ffn, form, block=block))


@settings(max_examples=30, deadline=None)
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
    y_nd = lowered(kind, block)(pool, x_nd, slot_nk, weight_nk)
    assert y_nd.dtype == jnp.float32
    expected = dense(form, pool, x_nd, slot_nk, weight_nk)
    np.testing.assert_allclose(y_nd, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=8, deadline=None)  # each example compiles twice
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([1, 2, 23, 90]),
    sizes=st.sampled_from([(8, 12), (19, 5), (1, 1), (64, 33)]),
    slots=st.sampled_from([1, 5, 40]),
    absent=st.sampled_from([0.0, 0.5, 1.0]),
    kept=st.sampled_from([None, (HALF,) * 3, MIXED, (ROUNDED["mxfp4"],) * 3]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    kind=st.integers(0, 2),
)
def test_in_cpp_and_in_jax_it_is_the_same(
    compiled, seed, rows, sizes, slots, absent, kept, dtype, kind
):
    rng = np.random.default_rng(seed)
    form = make_format(kind, *sizes, "float32", kept)
    pool, library = make_pool(form, slots), native_pool(form, slots)
    x_nd = jnp.asarray(rng.normal(size=(rows, sizes[0])), dtype)
    slot_nk = rng.integers(0, slots, (rows, 3)).astype(np.int32)
    slot_nk[rng.random((rows, 3)) < absent] = -1
    weight_nk = rng.random((rows, 3)).astype(np.float32)
    expected = dense(form, pool, np.asarray(x_nd), slot_nk, weight_nk)
    number = jnp.int32(library.number)
    for argument, rounds in ((number, False), (pool, dtype == "bfloat16")):
        ffn = jax.jit(functools.partial(form.ffn, layers=1))
        y_nd = ffn(argument, x_nd, slot_nk, weight_nk)
        assert y_nd.dtype == jnp.float32
        # JAX rounds weights and inner activations to the dtype.
        tolerance = (3e-2 if rounds else 1e-4) * (1 + np.abs(expected).max())
        np.testing.assert_allclose(y_nd, expected, rtol=0, atol=tolerance)


@st.composite
def any_formats(draw) -> tuple[int, int, Kept]:
    """Widths, and formats of gate, up and down that support them; groups need not divide them."""
    d, f = draw(st.tuples(*[st.sampled_from([8, 24, 40, 136, 33, 7])] * 2))

    def one() -> WeightFormat:
        kind = draw(st.sampled_from(["float16", "int8", "fp8", "int4", "mxfp4"]))
        if kind == "float16":
            return WeightFormat(kind)
        group = draw(st.sampled_from([8, 16, 32, 128, 5, d]))
        scale = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
        if kind == "mxfp4":
            kept = WeightFormat(kind, group, "e8m0")
        else:
            kept = WeightFormat(kind, group, scale, draw(st.booleans()))
        return kept if kept.fits(d) and kept.fits(f) else HALF

    return d, f, (one(), one(), one())


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(shape=any_formats(), rows=st.sampled_from([1, 9, 40]), seed=st.integers(0, 2**31))
def test_any_formats_of_odd_sizes_in_cpp(compiled, shape, rows, seed):
    d, f, kept = shape
    form = make_format(0, d, f, kept=kept)
    pool, library, rng = make_pool(form, 3), native_pool(form, 3), np.random.default_rng(seed)
    whole = [kept.bytes(d_in, -(-d_out // 16) * 16) for kept, d_in, d_out in form.matrices.values()]
    assert library.bytes == 3 * sum(whole), "outputs are filled up to vectors"
    held = form.empty()
    library.get(2, held)
    for (name, own), leaf in zip(form.leaves.items(), held, strict=True):
        assert (leaf.shape, leaf.dtype) == (own.shape, own.dtype), name
    for ours, theirs in zip(held, pool, strict=True):
        assert ours.tobytes() == np.asarray(theirs)[2].tobytes()
    x_nd = rng.normal(size=(rows, d)).astype(np.float32)
    slot_nk = rng.integers(-1, 3, (rows, 2)).astype(np.int32)
    weight_nk = rng.random((rows, 2)).astype(np.float32)
    y_nd = form.ffn(jnp.int32(library.number), jnp.asarray(x_nd), slot_nk, weight_nk, 1)
    expected = dense(form, pool, x_nd, slot_nk, weight_nk)
    np.testing.assert_allclose(y_nd, expected, rtol=0, atol=1e-4 * (1 + np.abs(expected).max()))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([1, 3, 61]),
    sizes=st.sampled_from([(8, 12), (19, 5), (64, 33), (40, 300)]),
    name=st.sampled_from(["float32", "bf16", "int8", "int4", "mxfp4"]),
    in_cpp=st.booleans(),
)
def test_products_of_the_trunk(compiled, seed, rows, sizes, name, in_cpp):
    """`Weight` and `GatedMLP` in any format, in C++ and in JAX."""
    kept = WeightFormat("float32") if name == "float32" else ROUNDED[name]
    kept = kept if kept.fits(sizes[0]) and kept.fits(sizes[1]) else HALF
    form = make_format(0, *sizes, kept=(kept,) * 3)
    x_nd = np.random.default_rng(seed).normal(size=(rows, sizes[0])).astype(np.float32)
    mlp, pool = GatedMLP(*sizes, jnp.dtype("float32")), make_pool(form, 1)
    leaves = dict(zip(form.leaves, pool, strict=True))
    for part in ("gate", "up", "down"):
        weight = getattr(mlp, part).weight
        weight.keep_as(kept)
        for array in kept.arrays(weight.d_in, weight.d_out):
            getattr(weight, array)[...] = leaves[f"w_{part}.{array}"][0]
    only = np.zeros((rows, 1), np.int32)
    expected = dense(form, pool, x_nd, only, np.ones((rows, 1)))
    arrays = {array: leaves[f"w_gate.{array}"][0] for array in kept.arrays(*sizes)}
    values = np.asarray(kept.dequantise(arrays, sizes[0]))
    if in_cpp:
        for part in (mlp.gate, mlp.up, mlp.down):
            part.weight.pack()
    np.testing.assert_allclose(mlp.gate.weight(x_nd), x_nd @ values, rtol=0, atol=1e-4)
    tolerance = 1e-4 * (1 + np.abs(expected).max())
    np.testing.assert_allclose(mlp(x_nd), expected, rtol=0, atol=tolerance)
    chosen = mlp.gate.weight.columns(jnp.array([2, 0]))
    np.testing.assert_array_equal(chosen, values[:, [2, 0]].T)


def test_without_a_compiler_there_is_no_library(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler -pipe")
    assert native.build(tmp_path) is None
    assert "no-such-compiler" in caplog.text
    monkeypatch.setenv("CXX", "false")
    assert native.build(tmp_path) is None
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
            form.ffn(pool, *rows, 1),
        ):
            assert y_nd.shape == (2, D) and not y_nd.any()


def test_blocks_grow_with_the_rows_an_expert_gets():
    blocks = [block_rows(rows * 6, 64) for rows in (1, 8, 64, 128, 1024, 100_000)]
    assert blocks == sorted(blocks) and blocks[0] == 1 and blocks[-1] == 64
    # Blocks are not too small: a block takes at least half of an expert's average rows.
    assert all(
        block >= min(rows * 6 / 64, 64) / 2
        for block, rows in zip(blocks, (1, 8, 64, 128, 1024, 100_000), strict=True)
    )
