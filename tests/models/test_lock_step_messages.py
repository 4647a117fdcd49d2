"""Encoding of rows: the decoded rows equal the sent rows within the error of the encoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.models.lock_step_messages import (
    NO_EXPERT,
    decode,
    encode,
    join_columns,
    rounded,
    row_bytes,
    split_columns,
)
from dance_jax.models.topology import CHUNK, Topology


def rows(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_joined_columns_come_back_bit_for_bit(dtype):
    expert_tk = jnp.asarray([[0, 1, NO_EXPERT]] * 4 + [[40_000, 255, 256]], jnp.uint16)
    columns = (expert_tk, jnp.asarray(rows((5, 3))), *encode(jnp.asarray(rows((5, 7))), dtype))
    joined = join_columns(columns)
    assert joined.shape == (5, row_bytes(columns))
    for got, sent in zip(split_columns(joined, columns), columns, strict=True):
        assert got.dtype == sent.dtype
        np.testing.assert_array_equal(got, sent)


def test_the_wire_is_exact_in_the_dtype_of_the_sums():
    x_nd = jnp.asarray(rows((5, 7)))
    for dtype in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        sent = x_nd.astype(dtype)
        np.testing.assert_array_equal(decode(encode(sent, dtype), dtype), sent)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), min_size=1),
)
def test_int8_is_off_by_half_a_step_of_its_row(values):
    x_nd = np.array(values, np.float32)
    got = np.asarray(decode(encode(jnp.asarray(x_nd), jnp.dtype(jnp.int8)), jnp.dtype(np.float32)))
    step_n1 = np.abs(x_nd).max(-1, keepdims=True) / 127
    # A step that is a subnormal number counts as zero.
    least = 127 * np.finfo(np.float32).tiny
    assert (np.abs(got - x_nd) <= step_n1 * 0.5001 + least).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_rounded_rows_are_what_arrives_but_for_int8(dtype):
    dtype = jnp.dtype(dtype)
    special = jnp.asarray([[0.0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-8, 1e-40]], jnp.float32)
    x_nd = jnp.concatenate([jnp.asarray(rows((50, 7))), special])
    got = jax.jit(lambda x: rounded(x, dtype))(x_nd)
    wanted = x_nd if dtype == jnp.int8 else decode(encode(x_nd, dtype), jnp.dtype(jnp.float32))
    np.testing.assert_array_equal(got[:-1], wanted[:-1])
    np.testing.assert_array_equal(got[-1, :-1], wanted[-1, :-1])
    halves = got[:-1].astype(jnp.bfloat16)
    assert (rounded(halves, jnp.dtype(jnp.float32)) == halves).all()


def test_topology_names_the_first_device_of_each_server():
    topology = Topology(rank=1, devices=(1, 1, 2), max_step_tokens=60)
    assert [topology.gateway(n) for n in range(3)] == [0, 1, 2]
    assert topology.peers == (0, 2)
    assert topology.max_rows(2) == 120
    assert topology.room >= 180 and topology.room % CHUNK == 0
