"""Ranks, exact rounding and free slots: shared by policies; runs with 64-bit integers."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def ranks(keys: jax.Array) -> jax.Array:
    """Rank of every entry along the last axis, smallest key first, ties: lowest index; int64."""
    order = jnp.argsort(keys, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True).astype(jnp.int64)


def largest_remainder(total: jax.Array, weights: jax.Array) -> jax.Array:
    """Splits `total` in proportion to integer weights, exactly: int64, sums to `total`.

    Everyone gets the whole part of its share; what is left over goes by one to the largest
    remainders, ties to the lowest index. Weights of 0 get nothing; all-zero weights give zeros.

    >>> with jax.enable_x64(True):
    ...     largest_remainder(jnp.int64(10), jnp.array([1, 1, 4])).tolist()
    [2, 2, 6]
    """
    weight_sum = jnp.maximum(weights.sum(), 1)
    whole = total * weights // weight_sum
    remainder = total * weights % weight_sum
    left_over = jnp.where(weights.sum() > 0, total - whole.sum(), 0)
    return whole + (ranks(-remainder) < left_over).astype(jnp.int64)


def fill(resident_nle: jax.Array, wish_nle: jax.Array, capacities_n: jax.Array) -> jax.Array:
    """Gives the free slots of every server the experts it wishes most: bool [n, l, e].

    Args:
        resident_nle: bool, what servers hold, within their capacities.
        wish_nle: float, any finite numbers; ties: lowest layer, lowest expert.
        capacities_n: int64 slots, none above layers * experts.
    """
    resident_nx = resident_nle.reshape(resident_nle.shape[0], -1)
    wish_nx = jnp.where(resident_nx, -jnp.inf, wish_nle.reshape(resident_nx.shape))
    free_n = capacities_n - resident_nx.sum(axis=1, dtype=jnp.int64)
    return (resident_nx | (ranks(-wish_nx) < free_n[:, None])).reshape(resident_nle.shape)
