"""What one device remembers between steps: cached positions, seen tokens, counts, links."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.config import EngineConfig
from dance_jax.models.config import ModelConfig
from dance_jax.models.messages import Transport

#: A jax.Array on the device, an np.ndarray on the host.
Leaf = Any


class Memory(NamedTuple):
    """One device's state, donated to every step and returned by it."""

    #: Per layer [slots, positions, w] in the engine's dtype.
    cache: tuple[Leaf, ...]
    #: bool [slots, v], tokens of each sequence so far.
    seen: Leaf
    #: int32 [l, e], expert calls of this device's tokens since the start.
    counts: Leaf
    #: `Exchanged.memory` of each MoE layer, on a leading axis.
    links: Any


def cache_positions(config: EngineConfig) -> int:
    """Positions a slot has: the context, and room for the padding of its last chunk.

    Unused rows of a step write there too, so that no row needs a test.
    """
    return config.max_model_len + max(chunk for _, chunk in config.prefill)


def cache_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes of one device's KV cache."""
    positions = config.max_num_seqs * cache_positions(config)
    return model.num_layers * positions * model.cache_width * jnp.dtype(config.dtype).itemsize


def new_memory(model: ModelConfig, config: EngineConfig, transport: Transport) -> Memory:
    """An empty memory, in numpy."""
    shape = (config.max_num_seqs, cache_positions(config), model.cache_width)
    dtype = jnp.dtype(config.dtype)
    layers = len(model.moe_layers)
    return Memory(
        cache=tuple(np.zeros(shape, dtype) for _ in range(model.num_layers)),
        seen=np.zeros((config.max_num_seqs, model.vocab_size), bool),
        counts=np.zeros((layers, model.num_experts), np.int32),
        links=transport.memory(layers),
    )


@jax.named_scope("write")
def write(cache_smw: Array, fresh_rcw: Array, slot_r: Array, position_r: Array) -> Array:
    """Puts each row's fresh entries at position_r of its slot, in place where donated."""

    def put(r: Array, cache: Array) -> Array:
        row = lax.dynamic_index_in_dim(fresh_rcw, r)
        return lax.dynamic_update_slice(cache, row, (slot_r[r], position_r[r], jnp.int32(0)))

    return lax.fori_loop(0, fresh_rcw.shape[0], put, cache_smw)
