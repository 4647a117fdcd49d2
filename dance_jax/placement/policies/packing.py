"""Balances the calls of experts, for `smartmoe` and `eplb`; runs with 64-bit integers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def expert_load(counts_nle: jax.Array) -> jax.Array:
    """Calls of every expert by all servers together: [l, e] of the counts' type.

    In a layer without calls all experts count the same.
    """
    load_le = counts_nle.sum(axis=0)
    return jnp.where(load_le.sum(axis=1, keepdims=True) > 0, load_le, jnp.ones_like(load_le))


def pack(
    weight_i: jax.Array, places_p: jax.Array, devices_p: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Packs items, heaviest first, each into the lightest pack per device that has a place.

    Ties go to the lowest index, of items and of packs.

    >>> with jax.enable_x64(True):
    ...     pack(jnp.array([5.0, 9.0, 4.0, 3.0]), jnp.array([2, 2]), jnp.ones(2))[0].tolist()
    [1, 0, 1, 0]

    Args:
        weight_i: float weights of the items.
        places_p: int64 items each pack can take, at least as many as there are items in all.
        devices_p: devices of each pack, of the type of the weights.

    Returns:
        int64 [i] twice: the pack of each item, and the number of items before it in that pack.
    """

    def pack_next(packs: tuple[jax.Array, jax.Array], item: jax.Array):
        weight_p, items_p = packs
        lightness_p = jnp.where(items_p < places_p, weight_p / devices_p, jnp.inf)
        p = jnp.argmin(lightness_p)
        packs = weight_p.at[p].add(weight_i[item]), items_p.at[p].add(1)
        return packs, (p, items_p[p])

    order_i = jnp.argsort(-weight_i, stable=True)
    empty = jnp.zeros(devices_p.shape, weight_i.dtype), jnp.zeros_like(places_p)
    _, (pack_i, rank_i) = lax.scan(pack_next, empty, order_i)
    at_item_i = jnp.argsort(order_i)
    return pack_i[at_item_i], rank_i[at_item_i]
