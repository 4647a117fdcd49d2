"""Products with weights in the C++ library, in every instruction set that this machine has."""

from __future__ import annotations

import ctypes
import pathlib
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.models import kernels_cpu, native
from dance_jax.models.formats import WeightFormat
from dance_jax.models.kernels_cpu import NativePool, format_words
from dance_jax.models.layers import SILU
from tests.models.test_formats import FORMATS, random

#: Formats, including one with offsets, to which `quantise` does not round.
ALL = {**FORMATS, "offsets": WeightFormat("int4", 8, "float32", True)}
#: Inputs and outputs: whole vectors and panels, remainders, and more than a cache holds.
SIZES = ((64, 512), (200, 75), (136, 33), (264, 16), (8, 1), (1096, 70))


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A library with the products in every instruction set."""
    library = tmp_path_factory.mktemp("all") / "products.so"
    sources = [native._HERE / name for name in ("instruction_set.cc", "panels.cc", native._PRODUCT)]
    native._compile(library, sources, native.usable_instructions())
    symbols = ctypes.CDLL(str(library))
    symbols.ProductBy.restype = ctypes.c_bool
    return symbols


def arrays_of(form: WeightFormat, d_in: int, d_out: int, seed: int) -> dict[str, np.ndarray]:
    plain = WeightFormat(form.kind, form.group, form.scale)
    arrays = plain.quantise(random(d_in, d_out, seed))
    if form.offset:
        arrays["offset"] = random(*arrays["scale"].shape, seed + 1).astype(arrays["scale"].dtype)
    return arrays


def product(symbols: ctypes.CDLL, number: int, form: WeightFormat, panels, x, d_out: int):
    """x @ w with the n-th instruction set; None if there is no such set."""
    y, words = np.zeros((len(x), d_out), np.float32), format_words([form])
    there = symbols.ProductBy(
        ctypes.c_int64(number),
        *(ctypes.c_void_p(each.ctypes.data) for each in (words, panels)),
        *(ctypes.c_int64(size) for size in (x.shape[1], d_out)),
        ctypes.c_void_p(x.ctypes.data),
        ctypes.c_int64(len(x)),
        ctypes.c_void_p(y.ctypes.data),
    )
    return y if there else None


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_instructions_agree_with_numpy_and_with_each_other(
    compiled: pathlib.Path, forms: ctypes.CDLL, name: str
) -> None:
    form = ALL[name]
    sets = native.usable_instructions()
    for number, (d_in, d_out) in enumerate(SIZES):
        arrays = arrays_of(form, d_in, d_out, number)
        x = random(31, d_in, 100 + number)
        values = form.dequantise(arrays, d_in)
        expected = x.astype(np.float64) @ values
        bound = 1e-6 * (np.abs(x).astype(np.float64) @ np.abs(values)) + 1e-7
        panels = kernels_cpu.pack(form, arrays, d_in, d_out)
        found = [product(forms, n, form, panels, x, d_out) for n in range(len(sets))]
        for each in found:
            assert each is not None and (np.abs(each - expected) <= bound).all()
        fused = [each for each, own in zip(found, sets, strict=True) if own.needs]
        for each in fused:  # so a row has the same bits on all servers with fused products
            np.testing.assert_array_equal(each, fused[0])
        # A row does not depend on other rows, nor on whether XLA calls the product.
        for cut in ([*range(len(x))], [4, 7, 20]):
            parts = [product(forms, 0, form, panels, rows, d_out) for rows in np.split(x, cut)]
            np.testing.assert_array_equal(np.concatenate(parts), found[0])
        np.testing.assert_array_equal(kernels_cpu.linear((form, panels), x, d_out), found[0])
        chosen = np.array([0, d_out - 1, d_out + 5, -3], np.int32)
        weights = kernels_cpu.columns((form, panels), chosen, d_in, d_out)
        np.testing.assert_array_equal(weights, values[:, np.clip(chosen, 0, d_out - 1)].T)
    assert product(forms, len(sets), form, panels, x, d_out) is None


@settings(deadline=None, max_examples=8)
@given(
    rows=st.sampled_from([1, 2, 5, 40, 200]),
    sizes=st.sampled_from([(64, 96), (32, 16), (160, 512)]),
    name=st.sampled_from(["float32", "bf16", "int8", "int4"]),
    seed=st.integers(0, 2**31),
)
def test_a_row_has_the_same_bits_in_any_batch(compiled, rows, sizes, name, seed) -> None:
    """For experts and for projections per head, with any number of threads."""
    (d, f), form = sizes, ALL[name]
    pool = NativePool(d, f, SILU, (form, form, form), False, 3)
    for slot in range(3):
        parts = [arrays_of(form, *shape, seed + slot) for shape in ((d, f), (d, f), (f, d))]
        pool.put(slot, slot, [array for part in parts for array in part.values()])
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, d), dtype=np.float32)
    slot = rng.integers(-1, 3, (rows, 2)).astype(np.int32)
    weight = rng.random((rows, 2), dtype=np.float32)
    number = jnp.int32(pool.number)
    whole = np.asarray(kernels_cpu.experts(number, x, slot, weight))
    for row in {0, rows // 2, rows - 1}:
        own = slice(row, row + 1)
        alone = kernels_cpu.experts(number, x[own], slot[own], weight[own])
        np.testing.assert_array_equal(alone[0], whole[row])
    heads = np.tile(kernels_cpu.pack(form, arrays_of(form, d // 2, f, seed), d // 2, f), 2)
    by_head = kernels_cpu.linear((form, heads), x.reshape(rows, 2, d // 2), f)
    alone = kernels_cpu.linear((form, heads), x[:1].reshape(1, 2, d // 2), f)
    np.testing.assert_array_equal(alone[0], by_head[0])


def test_slots_are_written_while_others_compute(compiled: pathlib.Path) -> None:
    """A call reads one expert or the other, never parts of both."""
    d, f = 64, 64
    pool = NativePool(d, f, SILU, [WeightFormat("float32")] * 3, False, 1)
    experts = [[np.full(s, v, np.float32) for s in ((d, f), (d, f), (f, d))] for v in (0.01, 0.02)]
    call = jax.jit(kernels_cpu.experts)
    rows = np.ones((4, d), np.float32), np.zeros((4, 1), np.int32), np.ones((4, 1), np.float32)
    number, wanted = jnp.int32(pool.number), []
    for expert in experts:
        pool.put(0, 0, expert)
        wanted.append(np.asarray(call(number, *rows)))
    done = threading.Event()

    def write(pool: NativePool) -> None:
        while not done.is_set():
            for expert in experts:
                pool.put(0, 0, expert)

    writer = threading.Thread(target=write, args=(pool,))
    writer.start()
    try:
        for _ in range(200):
            found = np.asarray(call(number, *rows))
            assert any((found == each).all() for each in wanted)
    finally:
        done.set()
        writer.join()
    found = [np.empty_like(part) for part in experts[1]]
    pool.get(0, found)
    assert all((a == b).all() for a, b in zip(found, experts[1], strict=True))
    assert pool.bytes == sum(part.nbytes for part in found)
    with pytest.raises(IndexError):
        pool.get(1, found)
    del pool, writer
    with pytest.raises(ValueError, match="no pool has this number"):
        call(number, *rows).block_until_ready()


def test_of_several_at_once_one_compiles(
    compiled: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    made = []

    def compile_slowly(library: pathlib.Path, *_: object) -> None:
        time.sleep(0.2)
        library.write_bytes(b"")
        made.append(library)

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "_compile", compile_slowly)
    monkeypatch.setattr(native, "INSTALLED", tmp_path / "nowhere")
    built = []
    threads = [
        threading.Thread(target=lambda: built.append(native.build(tmp_path))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert built == made * 3


def test_time_for_routed_experts_is_counted(compiled: pathlib.Path):
    calls, seconds, assignments = before = kernels_cpu.routed_seconds()
    form, x_nd = WeightFormat("float32"), jnp.ones((1, 8))
    sizes = (8, 4), (8, 4), (4, 8)
    weights = [
        (form, kernels_cpu.pack(form, {"values": np.ones(size, np.float32)}, *size))
        for size in sizes
    ]
    kernels_cpu.gated_mlp(SILU, weights, 4, x_nd).block_until_ready()
    assert kernels_cpu.routed_seconds() == before, "the trunk's are not"
    pool = NativePool(8, 4, SILU, [form] * 3, False, 2)
    for slot in range(2):
        pool.put(slot, slot, [np.ones((8, 4), np.float32)] * 2 + [np.ones((4, 8), np.float32)])
    slot, weight = jnp.array([[1, -1, 0]], jnp.int32), jnp.ones((1, 3))
    kernels_cpu.experts(jnp.int32(pool.number), x_nd, slot, weight).block_until_ready()
    now = kernels_cpu.routed_seconds()
    assert (now[0], now[2]) == (calls + 1, assignments + 2) and now[1] > seconds
