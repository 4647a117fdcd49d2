"""`uniform`: every expert once, spread in proportion to memory, statistics ignored."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dance_jax.placement.core import Placement
from dance_jax.placement.policies.rounding import largest_remainder
from dance_jax.placement.problem import Problem


def layer_quotas(capacities_n: jax.Array, layers: int, experts: int) -> jax.Array:
    """Experts of each layer on each server, one copy in proportion to memory: int64 [n, l]."""
    quota_n = largest_remainder(jnp.int64(layers * experts), capacities_n)

    def cut_layer(left_n: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        # What is left is always a multiple of `experts`, so its shares sum to `experts`.
        size_n = largest_remainder(jnp.int64(experts), left_n)
        return left_n - size_n, size_n

    return lax.scan(cut_layer, quota_n, None, length=layers)[1].T


@functools.partial(jax.jit, static_argnames=("layers", "experts"))
def blocks(capacities_n: jax.Array, layers: int, experts: int) -> jax.Array:
    """The placement of `uniform`: bool [servers, layers, experts]."""
    size_nl1 = layer_quotas(capacities_n, layers, experts)[:, :, None]
    end_nl1 = jnp.cumsum(size_nl1, axis=0)
    expert_e = jnp.arange(experts, dtype=jnp.int64)[None, None, :]
    return (expert_e >= end_nl1 - size_nl1) & (expert_e < end_nl1)


def uniform(problem: Problem) -> Placement:
    """Cuts every layer into one block of consecutive experts per server, in server order.

    Server n gets layers * experts * capacity[n] / sum(capacity) experts in all (largest
    remainder, ties: lowest server) and in every layer an even part of that, so its blocks differ
    by at most one expert. Memory beyond one copy of the model stays empty.

    Worked example: capacities 253, 253, 506 and 24 x 32 experts: 192, 192, 384 experts, in
    each layer experts 0-7, 8-15 and 16-31.
    """
    _, layers, experts = problem.counts.shape
    with jax.enable_x64(True):
        return Placement(np.asarray(blocks(jnp.asarray(problem.capacities), layers, experts)))
