"""Attention over cached positions and the step's own tokens; MLA (absorbed form) and GQA."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dance_jax.models.config import GroupedAttention, LatentAttention, ModelConfig
from dance_jax.models.layers import Linear, RMSNorm, contract, parameter
from dance_jax.models.rope import rotate

#: Cached positions of one turn of the loop.
BLOCK = 128

#: DeepSeek's latents are normalised with this epsilon whatever rms_norm_eps says.
LATENT_EPS = 1e-6

Rotation = tuple[jax.Array, jax.Array]
#: entries [r, j, w] -> keys [r, j, g, key width], values [r, j, g, value width]
Split = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class Cached(NamedTuple):
    """What earlier steps left of the rows, in one layer; it is read where it lies."""

    #: [slots, positions, w]
    entries: jax.Array
    #: int32 [rows], the slot of each row; None: row r is slot r.
    slot: jax.Array | None = None

    def block(self, begin: jax.Array, size: int) -> jax.Array:
        """[rows, size, w]: the entries of every row from position `begin` on."""
        if self.slot is None:
            return jax.lax.dynamic_slice_in_dim(self.entries, begin, size, axis=1)
        shape = (1, size, self.entries.shape[2])
        starts = [(slot, begin, jnp.int32(0)) for slot in self.slot]
        return jnp.concatenate(
            [jax.lax.dynamic_slice(self.entries, start, shape) for start in starts]
        )


def attend(
    query_rcgqk: jax.Array,
    cached: Cached,
    fresh_rcw: jax.Array,
    start_r: jax.Array,
    split: Split,
    scale: float,
    window: int | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """Causal attention of a chunk over itself and over what is cached.

    Softmax in one pass over blocks with a running maximum and sum (arXiv 2205.14135), in float32.
    The number of blocks follows the longest sequence of the step, not the length of the cache.

    Args:
        query_rcgqk: [rows, chunk, key heads, queries per key head, key width].
        cached: position j of row r counts if j < start_r[r].
        fresh_rcw: [rows, chunk, width] entries of the chunk itself, at start_r[r] + 0..c-1.
        start_r: int32 [rows].
        split: cuts entries into keys [r, j, g, k] and values [r, j, g, v].
        scale: multiplies the scores.
        window: positions a token sees, itself included; None: all.
        block: cached positions read at once.

    Returns:
        float32 [rows, chunk, key heads, queries per key head, value width].
    """
    chunk, length = query_rcgqk.shape[1], cached.entries.shape[1]
    block = min(block, length)
    offset_c = jnp.arange(chunk)

    def scores(keys: jax.Array, seen_rcj: jax.Array) -> jax.Array:
        product = contract("rcgqk,rjgk->rgqcj", query_rcgqk, keys)
        return jnp.where(seen_rcj[:, None, None], product * scale, -jnp.inf)

    def weighted(weights: jax.Array, values: jax.Array) -> jax.Array:
        return contract("rgqcj,rjgv->rgqcv", weights.astype(values.dtype), values)

    keys, values = split(fresh_rcw)
    distance = offset_c[:, None] - offset_c[None, :]
    seen = (distance >= 0) & ((distance < window) if window else True)
    own = scores(keys, seen[None])
    # every token sees itself, so the maximum is finite from here on
    top = own.max(axis=-1)
    weights = jnp.exp(own - top[..., None])
    state = top, weights.sum(axis=-1), weighted(weights, values)

    def visit(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, sums = state
        # the last block may reach back over positions already visited: they are masked
        begin = jnp.minimum(index * block, length - block)
        keys, values = split(cached.block(begin, block))
        position_j = begin + jnp.arange(block)
        seen = (position_j[None] < start_r[:, None]) & (position_j >= index * block)[None]
        seen = seen[:, None, :]
        if window:
            distance = (start_r[:, None] + offset_c)[:, :, None] - position_j
            seen = seen & (distance < window)
        found = scores(keys, seen)
        new_top = jnp.maximum(top, found.max(axis=-1))
        weights = jnp.exp(found - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        return (
            new_top,
            total * shrink + weights.sum(axis=-1),
            sums * shrink[..., None] + weighted(weights, values),
        )

    first: int | jax.Array = 0
    if window:
        # rows without cached positions must not pull the loop back to the beginning
        oldest = jnp.where(start_r > 0, start_r, jnp.iinfo(jnp.int32).max).min() - window + 1
        first = jnp.maximum(oldest, 0) // block
    blocks = (start_r.max() + block - 1) // block
    _, total, sums = jax.lax.fori_loop(jnp.int32(first), blocks.astype(jnp.int32), visit, state)
    return jnp.moveaxis(sums / total[..., None], 3, 1)


class LatentAttentionLayer(nnx.Module):
    """MLA (arXiv 2405.04434, section 2.1) on compressed latents alone, for prefill and decode.

    A cached entry is [normalised latent (kv_lora_rank), rotated shared key (qk_rope_head_dim)].
    Keys are never expanded: q_nope . (W_uk latent) = (W_uk^T q_nope) . latent, and the values are
    read off the weighted latents: W_uv (sum of weights * latents).
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        shape = config.attention
        assert isinstance(shape, LatentAttention)
        heads, d = shape.num_heads, config.hidden_size
        query = heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
        self.shape, self.rope = shape, config.rope
        width = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        self.scale = width**-0.5 * config.rope.softmax_factor
        if shape.q_lora_rank is None:
            self.q = Linear(d, query, dtype)
        else:
            self.q_a = Linear(d, shape.q_lora_rank, dtype)
            self.q_norm = RMSNorm(shape.q_lora_rank, LATENT_EPS, dtype)
            self.q_b = Linear(shape.q_lora_rank, query, dtype)
        self.kv_a = Linear(d, config.cache_width, dtype)
        self.kv_norm = RMSNorm(shape.kv_lora_rank, LATENT_EPS, dtype)
        #: [heads, qk_nope_head_dim, kv_lora_rank] and [heads, kv_lora_rank, v_head_dim]
        self.w_uk = parameter((heads, shape.qk_nope_head_dim, shape.kv_lora_rank), dtype)
        self.w_uv = parameter((heads, shape.kv_lora_rank, shape.v_head_dim), dtype)
        self.out = Linear(heads * shape.v_head_dim, d, dtype)

    def __call__(
        self, hidden_rcd: jax.Array, rotation: Rotation, start_r: jax.Array, cached: Cached
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the attention's output [r, c, d] and the chunk's entries [r, c, w]."""
        shape, dtype = self.shape, hidden_rcd.dtype
        rows, chunk, _ = hidden_rcd.shape
        if shape.q_lora_rank is None:
            query = self.q(hidden_rcd)
        else:
            query = self.q_b(self.q_norm(self.q_a(hidden_rcd)))
        query = query.reshape(rows, chunk, shape.num_heads, -1)
        plain, turned = jnp.split(query, [shape.qk_nope_head_dim], axis=-1)
        absorbed = contract("rchn,hnk->rchk", plain, self.w_uk[...]).astype(dtype)
        turned = rotate(self.rope, turned, rotation)

        latent, key = jnp.split(self.kv_a(hidden_rcd), [shape.kv_lora_rank], axis=-1)
        key = rotate(self.rope, key[:, :, None], rotation)[:, :, 0]
        fresh = jnp.concatenate([self.kv_norm(latent), key], axis=-1)

        def split(entries: jax.Array) -> tuple[jax.Array, jax.Array]:
            shared = entries[:, :, None]
            return shared, shared[..., : shape.kv_lora_rank]

        mixed = attend(
            jnp.concatenate([absorbed, turned], axis=-1)[:, :, None],
            cached,
            fresh,
            start_r,
            split,
            self.scale,
        )
        values = contract("rchk,hkv->rchv", mixed[:, :, 0].astype(dtype), self.w_uv[...])
        values = values.astype(dtype)
        return self.out(values.reshape(rows, chunk, -1)), fresh


class GroupedAttentionLayer(nnx.Module):
    """GQA; a cached entry is [rotated keys of all key heads, values of all key heads]."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        shape = config.attention
        assert isinstance(shape, GroupedAttention)
        d, kv = config.hidden_size, shape.num_kv_heads * shape.head_dim
        self.shape, self.rope = shape, config.rope
        self.scale = shape.head_dim**-0.5 * config.rope.softmax_factor
        self.q = Linear(d, shape.num_heads * shape.head_dim, dtype)
        self.k = Linear(d, kv, dtype)
        self.v = Linear(d, kv, dtype)
        self.out = Linear(shape.num_heads * shape.head_dim, d, dtype)

    def __call__(
        self, hidden_rcd: jax.Array, rotation: Rotation, start_r: jax.Array, cached: Cached
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the attention's output [r, c, d] and the chunk's entries [r, c, w]."""
        shape = self.shape
        rows, chunk, _ = hidden_rcd.shape
        groups, width = shape.num_kv_heads, shape.head_dim
        query = self.q(hidden_rcd).reshape(rows, chunk, shape.num_heads, width)
        query = rotate(self.rope, query, rotation)
        keys = self.k(hidden_rcd).reshape(rows, chunk, groups, width)
        keys = rotate(self.rope, keys, rotation).reshape(rows, chunk, -1)
        fresh = jnp.concatenate([keys, self.v(hidden_rcd)], axis=-1)

        def split(entries: jax.Array) -> tuple[jax.Array, jax.Array]:
            pair = entries.reshape(rows, -1, 2, groups, width)
            return pair[:, :, 0], pair[:, :, 1]

        mixed = attend(
            query.reshape(rows, chunk, groups, -1, width),
            cached,
            fresh,
            start_r,
            split,
            self.scale,
            shape.sliding_window,
        )
        values = mixed.astype(hidden_rcd.dtype).reshape(rows, chunk, -1)
        return self.out(values), fresh
