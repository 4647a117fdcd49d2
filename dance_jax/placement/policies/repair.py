"""Gives experts the holders that a policy left out; runs with 64-bit integers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dance_jax.placement.core import Placement
from dance_jax.placement.policies.rounding import ranks
from dance_jax.placement.policies.transport import solve, value_bits
from dance_jax.placement.problem import Problem

#: Bits that break ties between equal calls.
NOISE_BITS = 10


@jax.jit
def _values(counts_nj: jax.Array, held_nj: jax.Array) -> jax.Array:
    """Values of copies, int64 [n, j]: one that is held is worth more than any calls, then calls.

    Differences add up along cycles of exchanges, one per node of `transport.balance`, so as many
    bits lie between held copies and calls, and between calls and noise.
    """
    servers = len(counts_nj)
    cycle_bits = (servers + 1).bit_length()
    top = value_bits(servers) - 1
    low = NOISE_BITS + cycle_bits
    _, exponent = jnp.frexp(counts_nj.max())
    calls_nj = jnp.ldexp(counts_nj, top - low - cycle_bits - exponent).astype(jnp.int64)
    key = jax.random.key(0, impl="threefry2x32")
    noise_nj = jax.random.bits(key, counts_nj.shape, jnp.uint32) >> (32 - NOISE_BITS)
    return (held_nj.astype(jnp.int64) << top) + (calls_nj << low) + noise_nj.astype(jnp.int64)


@jax.jit
def _without_excess(
    held_nj: jax.Array, before_nj: jax.Array, values_nj: jax.Array, holders: int
) -> jax.Array:
    """Drops added copies that are not needed, the least valuable ones first: bool [n, j]."""
    added_nj = held_nj & ~before_nj
    excess_j = held_nj.sum(axis=0) - holders
    key_nj = jnp.where(added_nj, values_nj, jnp.iinfo(jnp.int64).max)
    rank_nj = ranks(key_nj.T).T
    return held_nj & ~(added_nj & (rank_nj < excess_j[None, :]))


def repaired(placement: Placement, problem: Problem) -> Placement:
    """The placement itself if every expert has `problem.holders`, else the nearest one with them.

    It evicts as few copies as possible, of experts with more than `holders`, and adds no more than
    needed; they go where more calls then stay at home. That is the optimum of a transportation
    problem (`transport`) in which a copy that is held is worth more than all calls, without the
    copies that only fill slots.

    Worked example: one layer of 4 experts, `holders` 2, three servers of 3 slots that hold {0, 1},
    {2, 3} and {0}. Expert 0 has enough, the others need one more holder each. The servers call them
    [0, 5, 2, 1], [0, 1, 7, 1] and [9, 0, 1, 3] times. The first server takes 2, the second 1 and
    the third 3, which keeps 2 + 1 + 3 calls more at home; nothing is evicted.

    Args:
        placement: within the capacities.
        problem: its capacities hold every expert `holders` times.
    """
    if not placement.short(problem.holders).any():
        return placement
    counts, servers = problem.counts, len(problem.counts)
    with jax.enable_x64(True):
        before_nj = jnp.asarray(placement.resident.reshape(servers, -1))
        values_nj = _values(jnp.asarray(counts.reshape(servers, -1)), before_nj)
        solution = solve(
            values_nj,
            jnp.asarray(problem.capacities),
            jnp.zeros(servers, jnp.int64),
            values_nj.max().astype(jnp.float64) / 4,
            counts.shape[1],
            problem.holders,
        )
        held_nj = _without_excess(solution.held_nj, before_nj, values_nj, problem.holders)
    return Placement(np.asarray(held_nj).reshape(counts.shape))
