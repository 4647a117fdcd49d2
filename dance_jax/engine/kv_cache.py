"""The memory of one device between steps: KV blocks, recurrent states, counts, link memory.

A block holds `block_size` positions of one sequence; the scheduler assigns blocks to sequences
(engine.blocks). A layer with a recurrent state has a slot for each running sequence instead. If
rows of a step may fail, each sequence has two slots: a step reads one and writes the other, so a
failed sequence keeps its old state. Block 0 and slot 0 are scratch: unused rows of a step write
there, so no row needs a condition.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dance_jax.config import EngineConfig, UserError
from dance_jax.models.config import DeltaNet, Mixer, ModelConfig
from dance_jax.models.delta import DeltaState
from dance_jax.models.exchange import Exchange

#: A jax.Array on the device, an np.ndarray on the host.
Leaf = Any


class Memory(NamedTuple):
    """One device's memory, donated to every step and returned by it, layer by layer."""

    #: Per layer [1 + blocks, block_size, w] in the engine's dtype, or a `DeltaState` of
    #: 1 + copies * max_num_seqs slots.
    cache: list[Any]
    #: int32 [l, e]: expert calls of this device's tokens since the start.
    counts: Leaf
    #: `Exchanged.memory` of each MoE layer.
    links: list[Any]


def block_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes of one KV block over all layers; with MLA, only the latents are kept."""
    return config.block_size * model.cache_width * jnp.dtype(config.dtype).itemsize


def state_copies(servers: int, calls: bool) -> int:
    """Recurrent states per sequence: 2 if servers call each other, because rows may then fail."""
    return 2 if servers > 1 and calls else 1


def num_blocks(
    model: ModelConfig, config: EngineConfig, free: int | None = None, copies: int = 1
) -> int:
    """Number of KV blocks of one device, without the scratch block.

    Args:
        free: unused bytes of memory available to this device; None if memory is plentiful. If
            `config.kv_memory` is None, at most half of `free` is used; the number of blocks is then
            rounded down to whole contexts, so that it does not change with every start.
        copies: `state_copies`.

    Raises:
        UserError: the longest sequence does not fit.
    """
    each, wanted = block_bytes(model, config), config.max_num_seqs * config.max_blocks
    if not each:  # all layers have recurrent states: blocks take no memory
        return wanted
    states = state_bytes(model, config, copies)
    if config.kv_memory is not None:
        left = config.kv_memory - states
        count, given = max(left, 0) // each, f"kv_memory={config.kv_memory}"
    else:
        half = None if free is None else max(free // 2 - states, 0)
        room = wanted if half is None else half // each
        count = min(wanted, room // config.max_blocks * config.max_blocks)
        given = f"half of the {free or 0:,} bytes of free memory"
    if count < config.max_blocks:
        raise UserError(
            f"{given}: not enough: a context of {config.max_model_len} tokens takes "
            f"{config.max_blocks * each:,} bytes of KV cache{_beside_states(states, config)}; give "
            "more memory, or a smaller max_model_len or max_num_seqs"
        )
    return count


def _beside_states(states: int, config: EngineConfig) -> str:
    return f", plus {states:,} bytes of states of {config.max_num_seqs} sequences" * bool(states)


def cache_bytes(model: ModelConfig, config: EngineConfig, copies: int = 1) -> int:
    """Bytes of one device's KV cache if memory is plentiful."""
    return (1 + num_blocks(model, config, copies=copies)) * block_bytes(model, config)


def state_bytes(model: ModelConfig, config: EngineConfig, copies: int = 1) -> int:
    """Bytes of one device's recurrent states; 0 for models without them."""
    return (1 + copies * config.max_num_seqs) * model.state_bytes


def new_memory(
    model: ModelConfig, config: EngineConfig, blocks: int, exchange: Exchange, copies: int = 1
) -> Memory:
    """An empty memory in numpy, with `blocks` KV blocks plus scratch."""
    layers = len(model.moe_layers)
    links = exchange.memory(layers)
    return Memory(
        cache=[layer_cache(layer.mixer, config, blocks, copies) for layer in model.layers],
        counts=np.zeros((layers, model.num_experts), np.int32),
        links=[jax.tree.map(operator.itemgetter(layer), links) for layer in range(layers)],
    )


def layer_cache(
    mixer: Mixer, config: EngineConfig, blocks: int, copies: int = 1
) -> np.ndarray | DeltaState:
    """The empty cache of a layer with this mixer, in numpy."""
    if isinstance(mixer, DeltaNet):
        slots = 1 + copies * config.max_num_seqs
        return DeltaState(*(np.zeros((slots, *shape), np.float32) for shape in mixer.state_shapes))
    shape = (1 + blocks, config.block_size, mixer.cache_width)
    return np.zeros(shape, jnp.dtype(config.dtype))
