"""Reading and writing single slots of a device's expert pool."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dance_jax.models.experts import Pool, Weights


class SlotWrite(NamedTuple):
    """What a slot of a device is to hold."""

    slot: int
    weights: Weights


@jax.named_scope("write_slot")
def write(pool: Pool, slot: Array, fresh: Pool) -> Pool:
    """Puts an expert into a slot of one device, in place where the pool is donated.

    Args:
        slot: int32 []; -1 writes nothing.
        fresh: the expert's weights.
    """

    def put(_: Array, pool: Pool) -> Pool:
        return tuple(
            lax.dynamic_update_index_in_dim(old, new, slot, 0)
            for old, new in zip(pool, fresh, strict=True)
        )

    return lax.fori_loop(0, (slot >= 0).astype(jnp.int32), put, pool)


def read(pool: Pool, slot: Array) -> Pool:
    """The weights in slot `slot`, int32 [], of one device."""
    return tuple(lax.dynamic_index_in_dim(leaf, slot, keepdims=False) for leaf in pool)
