"""The one jitted step: decode rows and a slice of prefill, experts wherever they live."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from dance_jax.config import EngineConfig
from dance_jax.engine.kv_cache import Leaf, Memory, write_entries
from dance_jax.engine.sampling import Adjustments, SamplingState, sample, sampling_state
from dance_jax.engine.scheduler import Row
from dance_jax.models.attention import Rows
from dance_jax.models.exchange import Exchange, Tables
from dance_jax.models.experts import ExpertFormat, Pool
from dance_jax.models.messages import Transport
from dance_jax.models.topology import Topology

#: (decode rows, slice rows) of a compiled step.
Bucket = tuple[int, int]
#: What a server tells the others of its work: none, some, and that some of it decodes.
IDLE, BUSY, DECODING = 0, 1, 2


class Batch(NamedTuple):
    """What one device computes in a step: d decode rows, then s rows of a slice; r = d + s.

    The tokens, t, are one of each decode row, then block_size of each row of the slice.
    """

    #: int32 [t], padded after a row's length.
    token: Leaf
    #: int32 [r]: position of the first token, number of tokens (0: row unused), and the first row
    #: of the same sequence.
    start: Leaf
    length: Leaf
    first: Leaf
    #: int32 [r, p]: blocks of the row's sequence; int32 [r]: the slot of its recurrent states.
    table: Leaf
    state: Leaf
    #: int32 []: what the server tells the others of itself, `messages.say`.
    said: Leaf
    sampling: SamplingState


class Outcome(NamedTuple):
    """What the host reads after a step, of one device."""

    #: int32 [r], float32 [r], int32 [r]: the sampled token, its logprob and rank.
    token: Leaf
    logprob: Leaf
    rank: Leaf
    #: int32 []: the most that a server had to do, and the batch of experts that all servers are
    #: ready to put in place, or 0.
    work: Leaf
    loaded: Leaf
    #: int32 [l, n, n] each: `Exchanged.rows` and `.bytes` of each MoE layer.
    rows: Leaf
    bytes: Leaf


class Extras(NamedTuple):
    """What the host reads only when it needs it, of one device."""

    #: int32 [r, 20] and float32 [r, 20]: most likely tokens.
    top_token: Leaf
    top_logprob: Leaf
    #: uint16 [t, l, k]: experts each token chose.
    routes: Leaf
    #: float32 [r, v].
    logits: Leaf


def token_slice(bucket: Bucket, config: EngineConfig, row: Row) -> slice:
    """Which of the batch's tokens are the row's."""
    decode, _ = bucket
    begin = row.index
    if row.index >= decode:
        begin = decode + (row.index - decode) * config.block_size
    return slice(begin, begin + len(row.tokens))


def host_batch(rows: tuple[Row, ...], bucket: Bucket, config: EngineConfig, said: int) -> Batch:
    """Numpy batch of one device.

    Args:
        rows: the rows in use.
        said: to the other servers, `messages.say` of IDLE, BUSY or DECODING and a batch.
    """
    decode, slices = bucket
    count = decode + slices
    token = np.zeros(decode + slices * config.block_size, np.int32)
    start = np.zeros(count, np.int32)
    length = np.zeros(count, np.int32)
    first = np.concatenate([np.arange(decode), np.arange(slices)]).astype(np.int32)
    table = np.zeros((count, config.max_blocks), np.int32)
    state = np.zeros(count, np.int32)
    for row in rows:
        token[token_slice(bucket, config, row)] = row.tokens
        start[row.index], length[row.index] = row.start, len(row.tokens)
        # Among the rows of its kind.
        first[row.index] = row.first - (decode if row.index >= decode else 0)
        table[row.index, : len(row.sequence.blocks)] = row.sequence.blocks
        state[row.index] = row.sequence.state_slot
    sampling = sampling_state({row.index: row.sequence for row in rows if row.sample}, count)
    said_array = np.array(said, np.int32)
    return Batch(token, start, length, first, table, state, said_array, sampling)


def batch_rows(batch: Batch, bucket: Bucket, block_size: int) -> tuple[Rows, ...]:
    """The batch's rows for the attention: those of the decode, those of the slice."""
    decode, slices = bucket
    parts = [(slice(0, decode), 1), (slice(decode, decode + slices), block_size)]
    return tuple(
        Rows(
            batch.start[part],
            batch.length[part],
            batch.first[part],
            batch.table[part],
            batch.state[part],
            chunk,
        )
        for part, chunk in parts
        if part.stop > part.start
    )


def pack(tree: Any) -> np.ndarray:
    """All leaves of a numpy tree as one int32 vector: one transfer instead of many."""
    return np.concatenate([_as_int32(leaf) for leaf in jax.tree.leaves(tree)])


def _as_int32(leaf: np.ndarray) -> np.ndarray:
    leaf = np.asarray(leaf)
    wide = leaf.astype(np.int32) if leaf.dtype == bool else leaf
    return np.ascontiguousarray(wide).reshape(-1).view(np.int32)


def unpack(vector: Array, like: Any) -> Any:
    """Inverse of `pack`, traced; `like` has the leaves' shapes and dtypes."""
    leaves, structure = jax.tree.flatten(like)
    out, offset = [], 0
    for leaf in leaves:
        part = vector[offset : offset + leaf.size].reshape(leaf.shape)
        offset += leaf.size
        if leaf.dtype == bool:
            out.append(part != 0)
        else:
            out.append(lax.bitcast_convert_type(part, leaf.dtype))
    return jax.tree.unflatten(structure, out)


def pack_traced(tree: Any) -> Array:
    """`pack` inside the step."""
    leaves = jax.tree.leaves(tree)
    parts = [
        leaf.astype(jnp.int32) if leaf.dtype == bool else lax.bitcast_convert_type(leaf, jnp.int32)
        for leaf in leaves
    ]
    return jnp.concatenate([part.reshape(-1) for part in parts])


def unpack_host(vector: np.ndarray, like: Any) -> Any:
    """Inverse of `pack_traced`, in numpy."""
    leaves, structure = jax.tree.flatten(like)
    sizes = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = [
        (part != 0 if leaf.dtype == bool else part.view(leaf.dtype)).reshape(leaf.shape)
        for part, leaf in zip(np.split(vector, sizes), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, parts)


def run_step(
    graphdef: nnx.GraphDef,
    form: ExpertFormat,
    topology: Topology,
    transport: Transport,
    config: EngineConfig,
    bucket: Bucket,
    like: tuple[Batch, Adjustments],
    state: dict[Any, Any],
    pool: Pool,
    tables: Tables,
    memory: Memory,
    packed: Array,
    packed_adjustments: Array,
) -> tuple[Memory, Array, Extras]:
    """One step of one device, inside shard_map: every array is this device's own.

    Args:
        form: what a slot of the pool holds.
        like: shapes and dtypes of what is in `packed` and `packed_adjustments`.
        state: the trunk's weights, nnx.to_pure_dict of its state.

    Returns:
        The new memory, the packed `Outcome`, and the extras.
    """
    batch: Batch = unpack(packed, like[0])
    adjustments: Adjustments = unpack(packed_adjustments, like[1])
    model = nnx.merge(graphdef, state)
    kinds = batch_rows(batch, bucket, config.block_size)
    chunk_r = np.concatenate([np.full(rows.count, rows.chunk) for rows in kinds])
    begin_r = np.cumsum(chunk_r) - chunk_r
    row_t = np.repeat(np.arange(len(chunk_r)), chunk_r)
    valid_t = np.arange(len(row_t)) - begin_r[row_t] < batch.length[row_t]
    position_t = jnp.concatenate([rows.positions_t for rows in kinds])
    sent_dtype = jnp.dtype(config.sent_dtype)
    exchange = Exchange(topology, form, pool, tables, batch.said, transport, sent_dtype)

    def moe(layer: Array, x_td: Array, expert_tk: Array, weight_tk: Array):
        links = jax.tree.map(lambda leaf: leaf[layer], memory.links)
        y_td, exchanged = exchange(layer, x_td, expert_tk, weight_tk, valid_t, links)
        return y_td, (expert_tk, exchanged)

    hidden_td, fresh, (route_ltk, exchanged) = model(
        batch.token, position_t, kinds, memory.cache, moe, config.max_model_len
    )
    last_r = begin_r.astype(np.int32) + jnp.maximum(batch.length - 1, 0)
    logits_rv = model.logits(hidden_td[last_r])
    sampled = sample(logits_rv, batch.sampling, adjustments)

    # All reads of the cache come before its first write: what is written waits for the token, which
    # waits for every layer. Otherwise XLA copies the last layers' caches.
    used_r = (batch.length > 0) & (sampled.token >= 0)
    cache = tuple(
        write_entries(layer, new, kinds, used_r)
        for layer, new in zip(memory.cache, fresh, strict=True)
    )
    layers = jnp.arange(route_ltk.shape[0])[:, None, None]
    calls = jnp.broadcast_to(valid_t[None, :, None], route_ltk.shape).astype(jnp.int32)
    counts = memory.counts.at[layers, route_ltk].add(calls)
    outcome = Outcome(
        token=sampled.token,
        logprob=sampled.logprob,
        rank=sampled.rank,
        work=exchanged.work[-1],
        loaded=exchanged.loaded[-1],
        rows=exchanged.rows,
        bytes=exchanged.bytes,
    )
    routes = jnp.moveaxis(route_ltk, 0, 1).astype(jnp.uint16)
    extras = Extras(sampled.top_token, sampled.top_logprob, routes, logits_rv)
    return Memory(cache, counts, exchanged.memory), pack_traced(outcome), extras
