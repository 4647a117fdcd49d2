"""Attention over the paged KV cache: MLA (absorbed form) and GQA.

The cache consists of blocks of positions in any order; a sequence's block table lists the blocks
of that sequence (arXiv 2309.06180). A step first writes the entries of its tokens to the cache,
then attends over the cache alone, so prefill and decode use the same arithmetic.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dance_jax.models import attention_cpu, native
from dance_jax.models.config import GroupedAttention, LatentAttention, ModelConfig
from dance_jax.models.layers import Linear, RMSNorm, Weight, contract, parameter, rms_norm
from dance_jax.models.rope import Rotation, rotate

#: Cached positions that one iteration of the loop reads, rounded to whole blocks.
SPAN = 128

#: DeepSeek normalises latents with this epsilon, regardless of rms_norm_eps.
LATENT_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Heads:
    """Layout of a cache entry: where the keys and values of each key head are, in floats.

    The keys of head g are at [g * key_width, (g + 1) * key_width). Its values are at
    value_begin + [g * value_width, (g + 1) * value_width). Keys and values may overlap.
    """

    count: int
    key_width: int
    value_begin: int
    value_width: int

    def split(self, entries: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Split entries [..., w] into keys [..., g, key_width] and values [..., g, value_width]."""
        keys = entries[..., : self.count * self.key_width]
        values = entries[..., self.value_begin :][..., : self.count * self.value_width]
        leading = entries.shape[:-1]
        return keys.reshape(*leading, self.count, -1), values.reshape(*leading, self.count, -1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("start_r", "length_r", "first_r", "table_rp", "state_r2"),
    meta_fields=("chunk",),
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a step with `chunk` tokens each; the tokens are laid out row after row.

    A sequence may have several rows if `chunk` is above 1; these rows are adjacent, in order and
    without gaps.
    """

    #: int32 [r], position of the first token of each row.
    start_r: jax.Array
    #: int32 [r], number of real tokens in each row; the rest is padding. 0 if the row is unused.
    length_r: jax.Array
    #: int32 [r], index of the first row of the same sequence.
    first_r: jax.Array
    #: int32 [r, p], block table: the cache blocks that hold the sequence's positions.
    table_rp: jax.Array
    #: int32 [r, 2], for mixers with recurrent states: the slot from which the step reads the
    #: sequence's states, and the slot to which the step writes them.
    state_r2: jax.Array
    chunk: int

    @staticmethod
    def whole(tokens: int) -> Rows:
        """Rows for one sequence of `tokens` tokens in block 0, with nothing cached yet."""
        zero = jnp.zeros(1, jnp.int32)
        return Rows(zero, zero + tokens, zero, zero[None], jnp.zeros((1, 2), jnp.int32), tokens)

    def part(self, begin: int, end: int) -> Rows:
        """Rows `begin` to `end`.

        The first row of a sequence becomes the first one within the part, so no mixer may have
        recurrent states.
        """
        rows = jax.tree.map(lambda leaf: leaf[begin:end], self)
        return dataclasses.replace(rows, first_r=jnp.maximum(rows.first_r - begin, 0))

    @property
    def count(self) -> int:
        return self.start_r.shape[0]

    @property
    def tokens(self) -> int:
        return self.count * self.chunk

    @property
    def positions_t(self) -> jax.Array:
        """int32 [r * chunk]"""
        return (self.start_r[:, None] + jnp.arange(self.chunk, dtype=jnp.int32)).reshape(-1)


def write_and_attend(
    query_tgqk: jax.Array,
    fresh_tw: jax.Array,
    batch: Sequence[Rows],
    cached_bsw: jax.Array,
    heads: Heads,
    scale: float,
    window: int | None = None,
    sinks_gq: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Run `write`, then `attend`; return the output and the cache. Arguments: see these two."""
    if native.usable():
        return attention_cpu.write_and_attend(
            query_tgqk, fresh_tw, batch, cached_bsw, heads, scale, window, sinks_gq
        )
    cached_bsw = write(cached_bsw, fresh_tw, batch)
    return attend(query_tgqk, batch, cached_bsw, heads, scale, window, sinks_gq), cached_bsw


@jax.named_scope("write")
def write(cached_bsw: jax.Array, fresh_tw: jax.Array, batch: Sequence[Rows]) -> jax.Array:
    """Write the entries of a step's tokens to the cache, in place if the cache is donated.

    Args:
        cached_bsw: [blocks, positions, width].
        fresh_tw: [t, width], entries of the tokens of all rows in `batch`; padding is not written.
    """
    blocks, size, _ = cached_bsw.shape
    begin = 0
    for rows in batch:
        fresh_rcw = fresh_tw[begin : begin + rows.tokens].reshape(rows.count, rows.chunk, -1)
        begin += rows.tokens
        position_rc = rows.positions_t.reshape(rows.count, rows.chunk)
        block_rc = jnp.take_along_axis(rows.table_rp, position_rc // size, axis=1, mode="clip")
        block_rc = jnp.where(jnp.arange(rows.chunk) < rows.length_r[:, None], block_rc, blocks)
        cached_bsw = cached_bsw.at[block_rc, position_rc % size].set(fresh_rcw, mode="drop")
    return cached_bsw


def attend(
    query_tgqk: jax.Array,
    batch: Sequence[Rows],
    cached_bsw: jax.Array,
    heads: Heads,
    scale: float,
    window: int | None = None,
    sinks_gq: jax.Array | None = None,
    span: int = SPAN,
) -> jax.Array:
    """Causal attention of a step's tokens over the cache, which already holds their entries.

    Softmax in one pass over spans with a running maximum and sum (arXiv 2205.14135), in float32.
    The number of spans depends on the longest sequence of the step, not on the size of the cache.

    Args:
        query_tgqk: [t, key heads, queries per key head, key width], for the tokens of all rows in
            `batch`.
        batch: the rows to which the tokens belong.
        cached_bsw: [blocks, positions, width].
        heads: layout of a cache entry.
        scale: multiplies the scores.
        window: positions a token sees, including its own; None for no limit.
        sinks_gq: float32 [key heads, queries per key head], an additional score per head whose
            value is 0.
        span: cached positions read at once, rounded to whole blocks.

    Returns:
        float32 [t, key heads, queries per key head, value width].
    """
    begin, parts = 0, []
    for rows in batch:
        query = query_tgqk[begin : begin + rows.tokens]
        begin += rows.tokens
        parts.append(_attend_rows(query, rows, cached_bsw, heads, scale, window, sinks_gq, span))
    return jnp.concatenate(parts)


#: Running maximum [r, g, q, c], sum [r, g, q, c] and weighted values [r, g, q, c, v].
_State = tuple[jax.Array, jax.Array, jax.Array]


def _attend_rows(
    query_tgqk: jax.Array,
    rows: Rows,
    cached_bsw: jax.Array,
    heads: Heads,
    scale: float,
    window: int | None,
    sinks_gq: jax.Array | None,
    span: int,
) -> jax.Array:
    """`attend` for one element of the batch."""
    size = cached_bsw.shape[1]
    pages = max(1, span // size)
    table_rp = jnp.pad(rows.table_rp, ((0, 0), (0, -rows.table_rp.shape[1] % pages)))
    query_rcgqk = query_tgqk.reshape(rows.count, rows.chunk, *query_tgqk.shape[1:])
    position_rc = rows.positions_t.reshape(rows.count, rows.chunk)

    def visit(index: jax.Array, state: _State) -> _State:
        block_rp = jax.lax.dynamic_slice_in_dim(table_rp, index * pages, pages, axis=1)
        entries = jnp.take(cached_bsw, block_rp, axis=0, mode="clip")
        keys, values = heads.split(entries.reshape(rows.count, pages * size, -1))
        behind_rcj = position_rc[:, :, None] - index * (pages * size) - jnp.arange(pages * size)
        seen_rcj = behind_rcj >= 0
        if window:
            seen_rcj &= behind_rcj < window
        return _accumulate(state, _scores(query_rcgqk, keys, seen_rcj, scale), values)

    used_r = rows.length_r > 0
    first, last = jnp.int32(0), jnp.where(used_r, rows.start_r + rows.length_r, 1).max()
    if window:
        unused = jnp.iinfo(jnp.int32).max
        first = jnp.maximum(jnp.where(used_r, rows.start_r, unused).min() - window + 1, 0)
        first = jnp.minimum(first, last) // (pages * size)
    last = (last + pages * size - 1) // (pages * size)
    shape = (rows.count, *query_tgqk.shape[1:3], rows.chunk)
    nothing = jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape)
    state = (*nothing, jnp.zeros((*shape, heads.value_width)))
    top, total, sums = jax.lax.fori_loop(first, last.astype(jnp.int32), visit, state)
    if sinks_gq is not None:
        total += jnp.exp(sinks_gq[:, :, None] - top)
    # An unused row may see no position at all; its result must still be finite.
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return jnp.moveaxis(sums / total[..., None], 3, 1).reshape(
        *query_tgqk.shape[:-1], sums.shape[-1]
    )


def _accumulate(state: _State, scores_rgqcj: jax.Array, values_rjgv: jax.Array) -> _State:
    """Update the running softmax state with more positions."""
    top, total, sums = state
    new_top = jnp.maximum(top, scores_rgqcj.max(axis=-1))
    weights = jnp.exp(scores_rgqcj - new_top[..., None])
    shrink = jnp.exp(top - new_top)
    return (
        new_top,
        total * shrink + weights.sum(axis=-1),
        sums * shrink[..., None] + _weighted(weights, values_rjgv),
    )


def _scores(
    query_rcgqk: jax.Array, keys_rjgk: jax.Array, seen_rcj: jax.Array, scale: float
) -> jax.Array:
    """Scores, float32 [r, g, q, c, j]; -inf where the token does not see the position."""
    product = contract("rcgqk,rjgk->rgqcj", query_rcgqk, keys_rjgk)
    return jnp.where(seen_rcj[:, None, None], product * scale, -jnp.inf)


def _weighted(weights_rgqcj: jax.Array, values_rjgv: jax.Array) -> jax.Array:
    return contract("rgqcj,rjgv->rgqcv", weights_rgqcj.astype(values_rjgv.dtype), values_rjgv)


class LatentAttentionLayer(nnx.Module):
    """MLA (arXiv 2405.04434, section 2.1) on the compressed latents, for prefill and decode.

    A cache entry is [normalised latent (kv_lora_rank), rotated shared key (qk_rope_head_dim)].
    Keys are never expanded: q_nope . (W_uk latent) = (W_uk^T q_nope) . latent. Values are computed
    from the weighted latents: W_uv (sum of weights * latents).
    """

    def __init__(self, config: ModelConfig, shape: LatentAttention, dtype: jnp.dtype):
        heads, d = shape.num_heads, config.hidden_size
        query = heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
        self.shape = shape
        if shape.q_lora_rank is None:
            self.q = Linear(d, query, dtype)
        else:
            self.q_a = Linear(d, shape.q_lora_rank, dtype, shape.bias)
            self.q_norm = RMSNorm(shape.q_lora_rank, LATENT_EPS, dtype)
            self.q_b = Linear(shape.q_lora_rank, query, dtype)
        self.kv_a = Linear(d, shape.cache_width, dtype, shape.bias)
        self.kv_norm = RMSNorm(shape.kv_lora_rank, LATENT_EPS, dtype)
        self.w_uk = Weight(shape.qk_nope_head_dim, shape.kv_lora_rank, dtype, heads)
        self.w_uv = Weight(shape.kv_lora_rank, shape.v_head_dim, dtype, heads)
        self.out = Linear(heads * shape.v_head_dim, d, dtype, shape.bias)

    def __call__(
        self,
        hidden_td: jax.Array,
        rotation_tk: Rotation,
        batch: Sequence[Rows],
        cached_bsw: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the attention's output [t, d] and the cache with the tokens' entries."""
        shape, dtype = self.shape, hidden_td.dtype
        tokens = hidden_td.shape[0]
        if shape.q_lora_rank is None:
            query = self.q(hidden_td)
        else:
            query = self.q_b(self.q_norm(self.q_a(hidden_td)))
        query = query.reshape(tokens, shape.num_heads, -1)
        plain, turned = jnp.split(query, [shape.qk_nope_head_dim], axis=-1)
        absorbed = self.w_uk(plain).astype(dtype)
        turned = rotate(shape.rope, turned, rotation_tk)

        latent, key = jnp.split(self.kv_a(hidden_td), [shape.kv_lora_rank], axis=-1)
        key = rotate(shape.rope, key[:, None], rotation_tk)[:, 0]
        fresh_tw = jnp.concatenate([self.kv_norm(latent), key], axis=-1)

        query = jnp.concatenate([absorbed, turned], axis=-1)[:, None]
        heads = Heads(1, shape.cache_width, 0, shape.kv_lora_rank)
        mixed, cached_bsw = write_and_attend(query, fresh_tw, batch, cached_bsw, heads, shape.scale)
        values = self.w_uv(mixed[:, 0].astype(dtype)).astype(dtype)
        return self.out(values.reshape(tokens, -1)), cached_bsw


class GroupedAttentionLayer(nnx.Module):
    """GQA; a cache entry is [rotated keys of all key heads, values of all key heads]."""

    def __init__(self, config: ModelConfig, shape: GroupedAttention, dtype: jnp.dtype):
        d, width = config.hidden_size, shape.head_dim
        queries, keys = shape.num_heads * width, shape.num_kv_heads * width
        self.shape, self.eps = shape, config.norm_eps
        self.q = Linear(d, queries * (2 if shape.gated else 1), dtype, shape.qkv_bias)
        self.k = Linear(d, keys, dtype, shape.qkv_bias)
        if not shape.values_are_keys:
            self.v = Linear(d, keys, dtype, shape.qkv_bias)
        self.out = Linear(queries, d, dtype, shape.out_bias)
        if shape.qk_norm != "none":
            flat, plus_one = shape.qk_norm == "flat", config.norm_plus_one
            self.q_norm = RMSNorm(queries if flat else width, config.norm_eps, dtype, plus_one)
            self.k_norm = RMSNorm(keys if flat else width, config.norm_eps, dtype, plus_one)
        if shape.sinks:
            self.sinks = parameter((shape.num_heads,), jnp.dtype("float32"))

    def __call__(
        self,
        hidden_td: jax.Array,
        rotation_tk: Rotation,
        batch: Sequence[Rows],
        cached_bsw: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the attention's output [t, d] and the cache with the tokens' entries."""
        shape = self.shape
        tokens, groups, width = hidden_td.shape[0], shape.num_kv_heads, shape.head_dim
        query, keys, values, gate = self._projected(hidden_td)
        query = rotate(shape.rope, query.reshape(tokens, -1, width), rotation_tk)
        keys = rotate(shape.rope, keys.reshape(tokens, groups, width), rotation_tk)
        fresh_tw = jnp.concatenate([keys.reshape(tokens, -1), values], axis=-1)

        mixed, cached_bsw = write_and_attend(
            query.reshape(tokens, groups, -1, width),
            fresh_tw,
            batch,
            cached_bsw,
            Heads(groups, width, groups * width, width),
            shape.scale,
            shape.window,
            self.sinks[...].reshape(groups, -1) if shape.sinks else None,
        )
        mixed_tq = mixed.astype(hidden_td.dtype).reshape(tokens, -1)
        if gate is not None:
            mixed_tq = mixed_tq * jax.nn.sigmoid(gate)
        return self.out(mixed_tq), cached_bsw

    def _projected(
        self, hidden_td: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Queries, keys and values before the rotation, and the gate: [t, heads * width] each."""
        shape, width = self.shape, self.shape.head_dim
        query, gate = self.q(hidden_td), None
        if shape.gated:
            # The projection yields, for each head, the query and then the gate.
            pair = query.reshape(-1, shape.num_heads, 2, width)
            query, gate = (pair[:, :, part].reshape(len(pair), -1) for part in (0, 1))
        keys = self.k(hidden_td)
        values = keys if shape.values_are_keys else self.v(hidden_td)
        if shape.qk_norm == "flat":
            query, keys = self.q_norm(query), self.k_norm(keys)
        elif shape.qk_norm == "head":
            query = self.q_norm(query.reshape(-1, shape.num_heads, width))
            keys = self.k_norm(keys.reshape(-1, shape.num_kv_heads, width))
            query, keys = (part.reshape(len(part), -1) for part in (query, keys))
        if shape.value_norm:
            heads = values.reshape(-1, shape.num_kv_heads, width)
            values = rms_norm(heads, jnp.ones(width, values.dtype), self.eps)
            values = values.reshape(len(keys), -1)
        if shape.clip is not None:
            query, keys, values = (
                jnp.clip(part, -shape.clip, shape.clip) for part in (query, keys, values)
            )
        return query, keys, values, gate
