"""Formats of weights: exact values, rounding, and common formats."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.config import Rounding, UserError
from dance_jax.models.formats import (
    Formats,
    Matrix,
    WeightFormat,
    common,
    described,
    pack_words,
    unpack_words,
)
from dance_jax.models.rounding import ROUNDED, rounded

FORMATS = {
    **ROUNDED,
    "float32": WeightFormat("float32"),
    "float16": WeightFormat("float16"),
    "fp8": WeightFormat("fp8", 128, "float32"),
    "int8 by output": WeightFormat("int8", 96, "float32"),
    "int8 of GGUF": WeightFormat("int8", 32, "float16"),
}
#: Largest error relative to the largest weight of a group; int4 has one value less on one side.
STEP = {"bf16": 2**-8, "int8": 1 / 253, "int4": 1 / 8, "mxfp4": 1 / 4, "fp8": 1 / 16}
STEP |= {"float32": 0, "float16": 2**-11, "int8 by output": 1 / 253, "int8 of GGUF": 1 / 253}


def random(d_in: int, d_out: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((d_in, d_out), dtype=np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_finds_near_values(name: str) -> None:
    form, values = FORMATS[name], random(96, 5)
    values[:40, 2] = 0
    arrays = form.quantise(values)
    likes = form.arrays(96, 5)
    assert {n: (a.shape, a.dtype) for n, a in arrays.items()} == {
        n: (like.shape, like.dtype) for n, like in likes.items()
    }
    assert form.bytes(96, 5) == sum(array.nbytes for array in arrays.values())
    found = form.dequantise(arrays, 96)
    group = form.group or 1
    for begin in range(0, 96, group):
        own = slice(begin, begin + group)
        most = np.abs(values[own]).max(axis=0)
        assert (np.abs(found[own] - values[own]) <= STEP[name] * most * 1.02).all()
    # JAX dequantises to the same values, and converting to the same format changes nothing.
    in_jax = form.dequantise({n: jnp.asarray(array) for n, array in arrays.items()}, 96)
    np.testing.assert_array_equal(in_jax, found)
    np.testing.assert_array_equal(Matrix(form, arrays, 96).to(form).values(), found)


def test_four_bit_codes_by_hand() -> None:
    values = np.arange(-8, 8, dtype=np.float32)[:, None] * 0.5
    arrays = WeightFormat("int4", 16, "float32").quantise(values)
    assert arrays["scale"] == [[0.5]]
    # The first input is in the lowest bits.
    assert [f"{word:08x}" for word in arrays["codes"][:, 0]] == ["76543210", "fedcba98"]
    halves = np.array([6, -6, 4, 0.5, -0.5, 0, 1.2, 5], np.float32)[:, None]
    form = WeightFormat("mxfp4", 32, "e8m0")
    arrays = form.quantise(halves)
    assert arrays["scale"] == [[127]]
    np.testing.assert_array_equal(form.dequantise(arrays, 8)[:, 0], [6, -6, 4, 0.5, -0.5, 0, 1, 4])


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_words_keep_their_codes(words: int, outputs: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (8 * words, outputs)).astype(np.uint8)
    np.testing.assert_array_equal(unpack_words(pack_words(codes)), codes)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(["int4", "mxfp4", "int8"]), min_size=2, max_size=3),
    st.lists(st.sampled_from([16, 32, 64]), min_size=3, max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.integers(0, 2**31),
)
def test_a_common_format_holds_all_without_loss(kinds, groups, offsets, seed) -> None:
    rng = np.random.default_rng(seed)
    matrices = []
    for kind, group, offset in zip(kinds, groups, offsets, strict=False):
        scale = "e8m0" if kind == "mxfp4" else "float16"
        plain = WeightFormat(kind, group, scale)
        arrays = plain.quantise(random(64, 3, seed))
        if offset and kind != "mxfp4":
            arrays["offset"] = rng.standard_normal(arrays["scale"].shape).astype(np.float16)
            plain = WeightFormat(kind, group, scale, True)
        matrices.append(Matrix(plain, arrays, 64))
    form = common(matrix.format for matrix in matrices)
    for matrix in matrices:
        assert common([form, matrix.format]) == form
        assert matrix.to(form).format == form
        np.testing.assert_array_equal(matrix.to(form).values(), matrix.values())


@st.composite
def any_format(draw: st.DrawFn, d_in: int) -> WeightFormat:
    kind = draw(st.sampled_from(["float32", "float16", "bfloat16", "int8", "fp8", "int4", "mxfp4"]))
    form = WeightFormat(kind)
    if kind not in ("float32", "float16", "bfloat16"):
        group = draw(st.sampled_from([1, 5, 8, 24, 32, 128, d_in]))
        scale = "e8m0" if kind == "mxfp4" else draw(st.sampled_from(["float32", "bfloat16"]))
        form = WeightFormat(kind, group, scale, kind != "mxfp4" and draw(st.booleans()))
    return form if form.fits(d_in) else WeightFormat("bfloat16")


@settings(deadline=None, max_examples=100)
@given(st.data(), st.sampled_from([7, 8, 24, 33, 40, 64, 100]), st.integers(0, 2**31))
def test_any_formats_of_any_size_have_a_common_one(data, d_in: int, seed: int) -> None:
    """The result does not depend on the order of the formats."""
    forms = data.draw(st.lists(any_format(d_in), min_size=2, max_size=4))
    form, rng = common(forms), np.random.default_rng(seed)
    assert common(forms[::-1]) == form == common([form, *forms])
    assert WeightFormat.parse(str(form)) == form
    likes = form.arrays(d_in, 3)
    for own in forms:
        plain = dataclasses.replace(own, offset=False)
        arrays = plain.quantise(random(d_in, 3, seed) * np.float32(10.0 ** rng.integers(-9, 4)))
        if own.offset:
            arrays["offset"] = random(*arrays["scale"].shape, seed).astype(arrays["scale"].dtype)
        matrix = Matrix(own, arrays, d_in)
        found = matrix.to(form)
        assert {n: (a.shape, a.dtype) for n, a in found.arrays.items()} == {
            n: (like.shape, like.dtype) for n, like in likes.items()
        }
        np.testing.assert_array_equal(found.values(), matrix.values())


def test_what_is_no_number_is_not_rounded() -> None:
    for wrong in (np.nan, np.inf, -np.inf):
        values = random(32, 2)
        values[3, 1] = wrong
        for name in ("int8", "int4", "mxfp4"):
            with pytest.raises(ValueError, match="1 of 64 weights are NaN or infinite"):
                ROUNDED[name].quantise(values)
    for form in (WeightFormat("int8", 32, "e8m0"), WeightFormat("int4", 32, "float32", True)):
        with pytest.raises(ValueError, match="rounding to this format is not supported"):
            form.quantise(random(32, 2))


def test_formats_have_a_text() -> None:
    for form in (*FORMATS.values(), WeightFormat("int4", 128, "float32", True)):
        assert WeightFormat.parse(str(form)) == form
    for text in ("int4", "int3:32:float16", "int8:32:float64", "int4:32:float16:zero", "float32:1"):
        with pytest.raises(ValueError, match="not a format"):
            WeightFormat.parse(text)
    formats = Formats({"w_gate": ROUNDED["int4"]}, {"head": ROUNDED["int8"]})
    assert Formats.from_json(formats.to_json()) == formats


def test_what_users_choose() -> None:
    half, codes = WeightFormat("bfloat16"), WeightFormat("fp8", 128, "float32")

    def of(choice: str, stored: WeightFormat, d_in: int, name: str = "w_gate") -> WeightFormat:
        rounding = Rounding(choice) if name.startswith("w_") else Rounding(trunk=choice)
        return rounded(rounding, name, stored, d_in)

    assert of("keep", half, 64) == half
    assert of("int4", half, 64) == ROUNDED["int4"]
    assert of("int4", half, 20) == half, "eight codes do not fill a word"
    assert of("int8", half, 20) == ROUNDED["int8"]
    assert of("int8", codes, 64) == codes, "codes stay"
    for name in ("w_gate", "layers.2.mlp.down.weight", "layers.0.shared.mlp.gate.weight"):
        assert of("int4-mixed", half, 64, name) == ROUNDED["int4"]
    for name in ("w_down", "head", "embedding", "layers.2.mixer.w_uk", "layers.0.mixer.q.weight"):
        assert of("int4-mixed", half, 64, name) == ROUNDED["int8"]
        assert of("int4", half, 64, name) == ROUNDED["int4"]
    assert of("int4", half, 64, "layers.0.router.weight") == half
    with pytest.raises(UserError, match="experts='int3'"):
        Rounding("int3")
    wide = Formats({"w_up": WeightFormat("float32")}, {"head": codes})
    assert wide.computed_in("float32") == wide
    assert wide.computed_in("bfloat16") == Formats({"w_up": half}, {"head": codes})


def test_formats_in_words() -> None:
    four, eight = ROUNDED["int4"], ROUNDED["int8"]
    assert described([(four, 64, 32)]) == "int4 (4.5 bits a weight)"
    assert described([(eight, 64, 32), (four, 64, 32), (four, 64, 32)]) == (
        "int4 and int8 (5.83 bits a weight)"
    )
    assert described([(ROUNDED["bf16"], 8, 8)]) == "bfloat16 (16 bits a weight)"
