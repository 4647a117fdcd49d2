"""Packing and sizes of messages; tests/cluster sends them between three processes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dance_jax.models.messages import (
    CHUNKS,
    LADDER,
    NO_EXPERT,
    pack_rows,
    unpack_rows,
    wire_bytes,
)
from dance_jax.models.topology import Topology


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_packed_rows_come_back_bit_for_bit(dtype):
    rng = np.random.default_rng(0)
    x_td = jnp.asarray(rng.normal(size=(5, 7)), dtype)
    expert_tk = jnp.asarray([[0, 1, NO_EXPERT]] * 4 + [[40_000, 255, 256]], jnp.int32)
    weight_tk = jnp.asarray(rng.random((5, 3)), jnp.float32)
    lanes = pack_rows(x_td, expert_tk, weight_tk)
    assert lanes.shape == (5, 7 * x_td.dtype.itemsize // 2 + 3 + 6)
    for got, sent in zip(
        unpack_rows(lanes, 7, 3, dtype), (x_td, expert_tk, weight_tk), strict=True
    ):
        assert got.dtype == sent.dtype
        np.testing.assert_array_equal(got, sent)


def test_topology_names_the_first_device_of_each_server():
    topology = Topology(rank=1, devices=(1, 1, 2), max_step_tokens=64)
    assert [topology.gateway(n) for n in range(3)] == [0, 1, 2]
    assert topology.peers == (0, 2)
    assert topology.max_rows(2) == 128


@given(st.lists(st.integers(0, 500), min_size=9, max_size=9), st.sampled_from(LADDER))
def test_bytes_are_at_least_the_bound_and_little_more(rows, first):
    rows = np.array(rows).reshape(3, 3) * (1 - np.eye(3, dtype=int))
    lanes, reply = 130, 100
    sent = wire_bytes(rows, np.array(first), lanes, reply)
    bound = 2 * (rows * lanes + rows.T * reply)
    assert (sent >= bound).all()
    slack = 2 * ((LADDER[-1] + CHUNKS[-1]) * (lanes + reply) + 4)
    assert (sent - bound <= slack).all()
    assert not np.diag(sent).any()


def test_layers_and_steps_add_up():
    rows = np.zeros((4, 3, 3), int)
    rows[1, 0, 2] = 21
    sent = wire_bytes(rows, np.zeros(4, int), 130, 100)
    assert sent.shape == (4, 3, 3)
    assert sent[0, 0, 1] == 2 * 4, "a header of four lanes"
    # 21 rows are 24 in chunks of 4, out and back.
    assert sent[1, 0, 2] == 2 * (4 + 24 * 130)
    assert sent[1, 2, 0] == 2 * (4 + 24 * 100)
