"""Rows that travel: what arrives is what was sent, or off by less than its encoding allows."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.models.messages import (
    NO_EXPERT,
    decode,
    encode,
    join_columns,
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
    assert (np.abs(got - x_nd) <= step_n1 * 0.5001 + 1e-37).all()


@pytest.mark.parametrize(("d", "k"), [(256, 6), (128, 6)])
def test_int8_rows_are_less_than_a_third_of_float32_rows(d: int, k: int):
    """Out and back, with expert numbers and weights; 128 is the demo model's width."""

    def both_ways(dtype) -> int:
        hidden = encode(jnp.zeros((1, d)), jnp.dtype(dtype))
        return 2 * row_bytes(hidden) + k * (2 + 4)

    assert both_ways(jnp.int8) <= 0.3 * both_ways(jnp.float32)


def test_topology_names_the_first_device_of_each_server():
    topology = Topology(rank=1, devices=(1, 1, 2), max_step_tokens=60)
    assert [topology.gateway(n) for n in range(3)] == [0, 1, 2]
    assert topology.peers == (0, 2)
    assert topology.max_rows(2) == 120
    assert topology.room >= 180 and topology.room % CHUNK == 0
