"""The one jitted step: a chunk of every row through the model, experts wherever they live."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from dance_jax.config import EngineConfig
from dance_jax.engine.kv_cache import Leaf, Memory, write
from dance_jax.engine.sampling import SamplingState, mark_seen, sample, sampling_state
from dance_jax.engine.scheduler import Row
from dance_jax.models.attention import Cached
from dance_jax.models.exchange import Exchange, Tables
from dance_jax.models.experts import Pool
from dance_jax.models.messages import Transport
from dance_jax.models.topology import Topology


class Batch(NamedTuple):
    """What one device computes in a step; r rows of c tokens."""

    #: int32 [r, c], padded after length.
    token: Leaf
    #: int32 [r]: position of the first token, number of tokens (0: row unused), slot.
    start: Leaf
    length: Leaf
    slot: Leaf
    #: bool []: this server has work.
    active: Leaf
    sampling: SamplingState


class Outcome(NamedTuple):
    """What the host reads after a step, of one device."""

    #: int32 [r], float32 [r], int32 [r]: the sampled token, its logprob and rank.
    token: Leaf
    logprob: Leaf
    rank: Leaf
    #: bool []: some server had work.
    active: Leaf
    #: int32 [l, n, n] and [l, n]: `Exchanged.rows` and `.sent` of each MoE layer.
    rows: Leaf
    sent: Leaf


class Extras(NamedTuple):
    """What the host reads only when it needs it, of one device."""

    #: int32 [r, 20] and float32 [r, 20]: most likely tokens.
    top_token: Leaf
    top_logprob: Leaf
    #: uint16 [r, c, l, k]: experts each token chose.
    routes: Leaf
    #: float32 [r, v].
    logits: Leaf


def host_batch(rows: tuple[Row, ...], shape: tuple[int, int], scratch: int, active: bool) -> Batch:
    """Numpy batch of one device.

    Args:
        rows: the rows in use.
        shape: (rows, chunk) of the bucket.
        scratch: a position past the context, where unused rows write.
        active: this server has work.
    """
    token = np.zeros(shape, np.int32)
    start = np.zeros(shape[0], np.int32)
    length = np.zeros(shape[0], np.int32)
    slot = np.arange(shape[0], dtype=np.int32)
    for row in rows:
        token[row.index, : len(row.tokens)] = row.tokens
        start[row.index], length[row.index] = row.start, len(row.tokens)
        slot[row.index] = row.slot
    sampling = sampling_state({r.index: r.sequence for r in rows if r.sample}, shape[0])
    return Batch(token, start, length, slot, np.array(active), sampling)


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
    topology: Topology,
    transport: Transport,
    config: EngineConfig,
    like: Batch,
    state: dict[Any, Any],
    pool: Pool,
    tables: Tables,
    memory: Memory,
    packed: Array,
) -> tuple[Memory, Array, Extras]:
    """One step of one device, inside shard_map: every array is this device's own.

    Args:
        like: shapes and dtypes of the batch in `packed`.
        state: the trunk's weights, nnx.to_pure_dict of its state.

    Returns:
        The new memory, the packed `Outcome`, and the extras.
    """
    batch: Batch = unpack(packed, like)
    model = nnx.merge(graphdef, state)
    rows, chunk = batch.token.shape
    valid_rc = jnp.arange(chunk) < batch.length[:, None]
    valid_t = valid_rc.reshape(-1)
    sent_dtype = jnp.dtype(config.sent_dtype)
    exchange = Exchange(topology, pool, tables, batch.active, transport, sent_dtype)

    def moe(layer: Array, x_td: Array, expert_tk: Array, weight_tk: Array):
        links = jax.tree.map(lambda leaf: leaf[layer], memory.links)
        y_td, exchanged = exchange(layer, x_td, expert_tk, weight_tk, valid_t, links)
        return y_td, (expert_tk, exchanged)

    # In a full decode row i is slot i.
    whole = chunk == 1 and rows == config.max_num_seqs
    cached = [Cached(layer, None if whole else batch.slot) for layer in memory.cache]
    hidden_rcd, fresh, (route_ltk, exchanged) = model(batch.token, batch.start, cached, moe)
    last_rd = jnp.take_along_axis(
        hidden_rcd, jnp.maximum(batch.length - 1, 0)[:, None, None], axis=1
    )[:, 0]
    logits_rv = model.logits(last_rd)
    seen = mark_seen(memory.seen, batch.slot, batch.start, batch.length, batch.token)
    sampled = sample(logits_rv, seen[batch.slot], batch.sampling)

    # All reads of the cache come before its first write: the position waits for the token, which
    # waits for every layer. Otherwise XLA copies the last layers' caches.
    used_r = (batch.length > 0) & (sampled.token >= 0)
    position_r = jnp.where(used_r, batch.start, config.max_model_len)
    cache = tuple(
        write(layer, new, batch.slot, position_r)
        for layer, new in zip(memory.cache, fresh, strict=True)
    )
    layers = jnp.arange(route_ltk.shape[0])[:, None, None]
    calls = jnp.broadcast_to(valid_t[None, :, None], route_ltk.shape).astype(jnp.int32)
    counts = memory.counts.at[layers, route_ltk].add(calls)
    outcome = Outcome(
        token=sampled.token,
        logprob=sampled.logprob,
        rank=sampled.rank,
        active=exchanged.active[-1],
        rows=exchanged.rows,
        sent=exchanged.sent,
    )
    route_rclk = jnp.moveaxis(route_ltk, 0, 1).reshape(rows, chunk, *jnp.shape(route_ltk)[::2])
    extras = Extras(
        sampled.top_token, sampled.top_logprob, route_rclk.astype(jnp.uint16), logits_rv
    )
    return Memory(cache, seen, counts, exchanged.memory), pack_traced(outcome), extras
