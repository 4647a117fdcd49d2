"""The parts of a step: decode rows and a slice of prefill, experts wherever they live.

`begin`, then `layer` for each layer, `logits`, `choose`: each is compiled on its own, a layer once
for all layers like it, and the host starts one after the other without waiting (runner.py). Where
the host computes routed experts, a layer that has them is `start_layer` and `finish_layer`, and the
host waits between them. All are functions of one device's arrays.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.config import EngineConfig
from dance_jax.engine.kv_cache import Leaf
from dance_jax.engine.sampling import (
    SamplingState,
    adjustments,
    sample,
    sampling_state,
)
from dance_jax.engine.scheduler import Row
from dance_jax.models.attention import Rows
from dance_jax.models.exchange import Exchanged, Experts, Group, HostCalls, TracedExchange
from dance_jax.models.rope import Rotation
from dance_jax.models.router import Routed
from dance_jax.models.trunk import Layer, Rest, Trunk

#: (decode rows, slice rows) of a compiled step.
Bucket = tuple[int, int]
#: What a server tells the others of its work: none, some, and that some of it decodes.
IDLE, BUSY, DECODING = 0, 1, 2


class StepBatch(NamedTuple):
    """What one device computes in a step: d decode rows, then s rows of a slice; r = d + s.

    The tokens, t, are one of each decode row, then block_size of each row of the slice. No more
    than d rows, one of a sequence, have a token sampled: in the order of `sampling_rows`.
    """

    #: int32 [t], padded after a row's length.
    token: Leaf
    #: int32 [r]: position of the first token, number of tokens (0: row unused), and the first row
    #: of the same sequence.
    start: Leaf
    length: Leaf
    first: Leaf
    #: int32 [r, p]: blocks of the row's sequence; int32 [r, 2]: `Rows.state_r2`.
    table: Leaf
    state: Leaf
    #: int32 []: what the server tells the others of itself, `messages.status_word`.
    status: Leaf
    #: int32 [d]: the tokens behind which one is sampled.
    last: Leaf
    sampling: SamplingState


class Crossed(NamedTuple):
    """What has crossed the links between servers in a step, and what they have told each other."""

    #: int32 [l, n, n] each: `Exchanged.rows` and `.bytes` of each MoE layer.
    rows: Leaf
    bytes: Leaf
    #: int32 [l]: `Exchanged.away` of each.
    away: Leaf
    #: int32 []: the most that a server had to do, and the batch of experts that all servers are
    #: ready to put in place, or 0.
    work: Leaf
    loaded: Leaf


class Outcome(NamedTuple):
    """What the host reads after a step, of one device."""

    #: int32 [d], float32 [d], int32 [d]: the sampled token, its logprob and rank.
    token: Leaf
    logprob: Leaf
    rank: Leaf
    #: bool []: some of the step's tokens have failed, `Extras.failed`.
    any_failed: Leaf
    crossed: Crossed


class Extras(NamedTuple):
    """What the host reads only when it needs it, of one device."""

    #: int32 [d, 20] and float32 [d, 20]: most likely tokens.
    top_token: Leaf
    top_logprob: Leaf
    #: uint16 [t, l, k]: experts each token chose.
    routes: Leaf
    #: bool [t]: tokens of which some expert was nowhere to be had.
    failed: Leaf
    #: float32 [d, v].
    logits: Leaf


class Record(NamedTuple):
    """What the layers of a step record, each in its place; l MoE layers."""

    #: `Extras.routes` and `.failed`.
    routes: Leaf
    failed: Leaf
    #: None where there is one server.
    crossed: Crossed | None


def token_slice(bucket: Bucket, config: EngineConfig, row: Row) -> slice:
    """Which of the batch's tokens are the row's."""
    decode, _ = bucket
    begin = row.index
    if row.index >= decode:
        begin = decode + (row.index - decode) * config.block_size
    return slice(begin, begin + len(row.tokens))


def sampling_rows(rows: tuple[Row, ...]) -> list[Row]:
    """The rows of one device that have a token sampled."""
    return [row for row in rows if row.sample]


def host_batch(
    rows: tuple[Row, ...], bucket: Bucket, config: EngineConfig, status: int
) -> StepBatch:
    """Numpy batch of one device.

    Args:
        rows: the rows in use.
        status: to the other servers, `messages.status_word` of IDLE, BUSY or DECODING and a batch.
    """
    decode, slices = bucket
    count = decode + slices
    token = np.zeros(decode + slices * config.block_size, np.int32)
    start = np.zeros(count, np.int32)
    length = np.zeros(count, np.int32)
    first = np.concatenate([np.arange(decode), np.arange(slices)]).astype(np.int32)
    table = np.zeros((count, config.max_blocks), np.int32)
    state = np.zeros((count, 2), np.int32)
    for row in rows:
        token[token_slice(bucket, config, row)] = row.tokens
        start[row.index], length[row.index] = row.start, len(row.tokens)
        # Among the rows of its kind.
        first[row.index] = row.first - (decode if row.index >= decode else 0)
        table[row.index, : len(row.sequence.blocks)] = row.sequence.blocks
        state[row.index] = row.sequence.state_slots
    last = np.zeros(decode, np.int32)
    sampled = sampling_rows(rows)
    last[: len(sampled)] = [token_slice(bucket, config, row).stop - 1 for row in sampled]
    sampling = sampling_state({n: row.sequence for n, row in enumerate(sampled)}, decode)
    status_array = np.array(status, np.int32)
    return StepBatch(token, start, length, first, table, state, status_array, last, sampling)


def batch_rows(batch: StepBatch, bucket: Bucket, block_size: int) -> tuple[Rows, ...]:
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
    leaves = [
        leaf.astype(np.int32) if leaf.dtype == bool else leaf for leaf in jax.tree.leaves(tree)
    ]
    return np.concatenate([leaf.reshape(-1).view(np.int32) for leaf in leaves])


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
    parts, begin = [], 0
    for leaf in leaves:
        part = vector[begin : begin + leaf.size]
        parts.append(
            (part != 0 if leaf.dtype == bool else part.view(leaf.dtype)).reshape(leaf.shape)
        )
        begin += leaf.size
    return jax.tree.unflatten(structure, parts)


@dataclasses.dataclass(frozen=True)
class Form:
    """What all parts of the steps of a bucket are compiled for."""

    bucket: Bucket
    config: EngineConfig
    exchange: TracedExchange | HostCalls
    #: MoE layers, experts of each, experts of a token.
    moe_layers: int
    num_experts: int
    top_k: int

    @property
    def tokens(self) -> int:
        decode, slices = self.bucket
        return decode + slices * self.config.block_size

    def batch(self, packed: Array) -> StepBatch:
        """What `host_batch` packed; a part of a step computes no more of it than it uses."""
        return unpack(packed, host_batch((), self.bucket, self.config, IDLE))

    def rows(self, batch: StepBatch) -> tuple[Rows, ...]:
        return batch_rows(batch, self.bucket, self.config.block_size)

    def groups(self, rows: tuple[Rows, ...]) -> list[tuple[slice, tuple[Rows, ...]]]:
        """The tokens and rows of each group of a layer: all, or a slice's rows in parts of which
        the first has the decode rows too."""
        _, slices = self.bucket
        count = min(self.exchange.groups, max(slices, 1))
        ends = [slices * n // count for n in range(1, count + 1)]
        cuts = [0, *(self.tokens - (slices - end) * self.config.block_size for end in ends)]
        tokens = [slice(*pair) for pair in itertools.pairwise(cuts)]
        if count == 1:
            return [(tokens[0], rows)]
        *decode, last = rows
        parts = [last.part(*pair) for pair in itertools.pairwise([0, *ends])]
        return [
            (own, (*decode, part) if n == 0 else (part,))
            for n, (own, part) in enumerate(zip(tokens, parts, strict=True))
        ]

    def valid(self, rows: tuple[Rows, ...]) -> Array:
        """bool [t], False for padding."""
        valid = [jnp.arange(each.chunk) < each.length_r[:, None] for each in rows]
        return jnp.concatenate([each.reshape(-1) for each in valid])


def begin(
    form: Form, trunk: Trunk, packed: Array
) -> tuple[Array, tuple[Rotation, ...], Array, Record]:
    """What the first layer gets, the rotations, the packed sampling state, and an empty record."""
    batch = form.batch(packed)
    positions_t = jnp.concatenate([rows.positions_t for rows in form.rows(batch)])
    hidden_td, rotations = trunk.embed(batch.token, positions_t, form.config.max_model_len)
    layers, servers = form.moe_layers, form.exchange.servers
    routes = jnp.zeros((form.tokens, layers, form.top_k), jnp.uint16)
    failed = jnp.zeros(form.tokens, bool)
    crossed = None
    if servers > 1:
        links = jnp.zeros((layers, servers, servers), jnp.int32)
        away = jnp.zeros(layers, jnp.int32)
        crossed = Crossed(links, links, away, jnp.int32(0), jnp.int32(0))
    return hidden_td, rotations, pack_traced(batch.sampling), Record(routes, failed, crossed)


def layer(
    form: Form,
    layer: Layer,
    hidden_td: Array,
    rotation_tk: Rotation | None,
    packed: Array,
    cached: Any,
    experts: Experts | None,
    links: Any,
    record: Record | None,
) -> tuple[Array, Any, Any, Record | None]:
    """A layer's output, and what is kept: its cache, its links and the record.

    Args:
        layer: of the trunk.
        experts, links, record: None for a layer without routed experts.
    """
    batch = form.batch(packed)
    rows = form.rows(batch)
    with jax.named_scope("layer"):
        if experts is None or record is None:
            rest, _, cached = layer.start(hidden_td, rotation_tk, rows, cached)
            return layer.finish(rest.hidden, layer.beside(rest.x), None), cached, links, record
        valid_t = form.valid(rows) & ~record.failed
        groups = form.groups(rows)
        outcome, cached = _run_groups(
            form,
            layer,
            hidden_td,
            rotation_tk,
            groups,
            cached,
            experts,
            valid_t,
            batch.status,
            links,
        )
    hidden_td, expert_tk, failed_t, exchanged = outcome
    put, at = lax.dynamic_update_index_in_dim, experts.layer
    crossed = record.crossed
    if crossed is not None:
        crossed = Crossed(
            put(crossed.rows, exchanged.rows, at, 0),
            put(crossed.bytes, exchanged.bytes, at, 0),
            put(crossed.away, exchanged.away, at, 0),
            exchanged.work,
            exchanged.loaded,
        )
    record = _recorded(record._replace(crossed=crossed), at, expert_tk, failed_t)
    return hidden_td, cached, exchanged.memory, record


def _run_groups(
    form: Form,
    layer: Layer,
    hidden_td: Array,
    rotation_tk: Rotation | None,
    groups: Sequence[tuple[slice, tuple[Rows, ...]]],
    cached: Any,
    experts: Experts,
    valid_t: Array,
    status: Array,
    links: Any,
) -> tuple[tuple[Array, Array, Array, Exchanged], Any]:
    """A layer with routed experts, a group of its tokens after the other.

    All that need not wait for a group's calls is computed while they are out: the next group up to
    its own calls, then what all have beside the routed experts.

    Returns:
        hidden [t, d], the experts chosen, int32 [t, k], the tokens that have failed, bool [t], and
        the traffic; and the cache.
    """
    exchange = form.exchange
    assert not isinstance(exchange, HostCalls)
    hidden = [hidden_td[tokens] for tokens, _ in groups]
    rests: list[Rest] = []
    sent: list[Group] = []
    for n, (tokens, rows) in enumerate(groups):
        rotation = jax.tree.map(lambda leaf, tokens=tokens: leaf[tokens], rotation_tk)
        rest, routed, cached = layer.start(hidden[n], rotation, rows, cached)
        assert routed is not None
        rests.append(rest)
        sent.append(Group(routed, valid_t[tokens], tokens.start))
        if n + 1 < len(groups):
            hidden[n + 1] = exchange.send(experts, sent[n], hidden[n + 1])
    hidden_td, x_td = map(jnp.concatenate, zip(*rests, strict=True))
    x_td = exchange.send(experts, sent[-1], x_td)
    beside_td = layer.beside(x_td)
    behind = x_td if beside_td is None else beside_td
    received = [exchange.receive(experts, group, behind, status, links) for group in sent]
    sums, failed, (*_, exchanged) = zip(*received, strict=True)
    expert_tk = jnp.concatenate([group.routed.expert for group in sent])
    hidden_td = layer.finish(hidden_td, beside_td, jnp.concatenate(sums))
    return (hidden_td, expert_tk, jnp.concatenate(failed), exchanged), cached


def _recorded(record: Record, layer: Array, expert_tk: Array, failed_t: Array) -> Record:
    """The record with a layer's routes and the rows that have failed in it."""
    routes = lax.dynamic_update_index_in_dim(
        record.routes, expert_tk.astype(jnp.uint16), layer, axis=1
    )
    return record._replace(routes=routes, failed=record.failed | failed_t)


def start_layer(
    form: Form,
    layer: Layer,
    hidden_td: Array,
    rotation_tk: Rotation | None,
    packed: Array,
    cached: Any,
    failed_t: Array,
) -> tuple[Any, Routed, Array, Any]:
    """A layer up to its routed experts, which the host computes.

    Args:
        failed_t: `Record.failed`.

    Returns:
        What `finish_layer` gets; what is routed, its hidden states in float32; bool [t], the rows
        that are to be; and the cache.
    """
    rows = form.rows(form.batch(packed))
    with jax.named_scope("layer"):
        rest, routed, cached = layer.start(hidden_td, rotation_tk, rows, cached)
        beside_td = layer.beside(rest.x)
    assert routed is not None
    routed = routed._replace(x=routed.x.astype(jnp.float32))
    return (rest.hidden, beside_td), routed, form.valid(rows) & ~failed_t, cached


def finish_layer(
    layer: Layer,
    rest: Any,
    number: Array,
    expert_tk: Array,
    sums_td: Array,
    failed_t: Array,
    record: Record,
) -> tuple[Array, Record]:
    """A layer from its routed experts' sums on: its output, and the record.

    Args:
        number: int32 [], which of the layers with routed experts it is.
    """
    hidden_td, beside_td = rest
    hidden_td = layer.finish(hidden_td, beside_td, sums_td)
    return hidden_td, _recorded(record, number, expert_tk, failed_t)


def logits(
    form: Form, trunk: Trunk, hidden_td: Array, packed: Array, counts_le: Array, record: Record
) -> tuple[Array, Array, Array]:
    """The end of a step.

    Returns:
        Logits after the tokens `StepBatch.last`, float32 [d, v]; `Memory.counts` with the calls of
        this step's tokens added, those that failed left out; whether any token failed, bool [].
    """
    batch = form.batch(packed)
    counted_t = form.valid(form.rows(batch)) & ~record.failed
    routes_tlk = record.routes.astype(jnp.int32)
    layer_l1 = jnp.arange(form.moe_layers)[:, None]
    calls_tlk = jnp.broadcast_to(counted_t[:, None, None], routes_tlk.shape).astype(jnp.int32)
    counts_le = counts_le.at[layer_l1, routes_tlk].add(calls_tlk, mode="promise_in_bounds")
    return trunk.logits(hidden_td[batch.last]), counts_le, record.failed.any()


def choose(
    longest: int,
    logits_dv: Array,
    packed_state: Array,
    packed_adjustments: Array,
    any_failed: Array,
    crossed: Crossed | None,
) -> tuple[Array, Array, Array]:
    """The fields of `Outcome`, packed, and `Extras.top_token` and `.top_logprob`.

    Args:
        longest: most tokens of a sequence.
        crossed: None where there is one server.
    """
    state = unpack(packed_state, sampling_state({}, len(logits_dv)))
    changes = unpack(packed_adjustments, adjustments({}, len(logits_dv), longest))
    sampled = sample(logits_dv, state, changes)
    outcome = pack_traced((sampled.token, sampled.logprob, sampled.rank, any_failed, crossed))
    return outcome, sampled.top_token, sampled.top_logprob
