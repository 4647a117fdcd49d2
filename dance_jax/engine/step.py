"""The parts of a step, which computes decode rows and a slice of prefill rows.

The parts are `begin`, then `layer` for each layer, `logits`, and `choose`. Each part is compiled
separately, a layer once for all identical layers, and the host starts one part after the other
without waiting (runner.py). If the host computes routed experts, a layer with routed experts is
split into `start_layer` and `finish_layer`, and the host waits between the two. All parts are
functions of one device's arrays.
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
    Sampled,
    SamplingState,
    adjustments,
    sample,
    sampling_state,
    scored,
)
from dance_jax.engine.scheduler import Row
from dance_jax.models.attention import Rows
from dance_jax.models.exchange import Exchanged, Experts, Group, HostCalls, TracedExchange
from dance_jax.models.rope import Rotation
from dance_jax.models.router import Routed
from dance_jax.models.trunk import Layer, Rest, Trunk

#: (decode rows, slice rows) of a compiled step.
Bucket = tuple[int, int]
#: Tokens scored at a time.
_SCORED = 32
#: A server's work as told to the other servers: none, some without decodes, or some with decodes.
IDLE, BUSY, DECODING = 0, 1, 2


class StepBatch(NamedTuple):
    """The input of a step on one device: d decode rows, then s slice rows; r = d + s.

    The t tokens are one per decode row, then block_size per slice row. At most d rows, one per
    sequence, have a token sampled, in the order of `sampling_rows`.
    """

    #: int32 [t], padded after each row's length.
    token: Leaf
    #: int32 [r] each: position of the row's first token, number of tokens (0 if the row is unused),
    #: and the first row of the same sequence.
    start: Leaf
    length: Leaf
    first: Leaf
    #: int32 [r, p]: block table of the row's sequence; int32 [r, 2]: `Rows.state_r2`.
    table: Leaf
    state: Leaf
    #: int32 []: the server's status as told to the other servers
    #: (`lock_step_messages.status_word`).
    status: Leaf
    #: int32 [d]: indices of the tokens after which a token is sampled.
    last: Leaf
    sampling: SamplingState


class Crossed(NamedTuple):
    """The traffic between servers in a step, and the status that they exchanged."""

    #: int32 [l, n, n] each: `Exchanged.rows` and `.bytes` of each MoE layer.
    rows: Leaf
    bytes: Leaf
    #: int32 [l]: `Exchanged.away` of each MoE layer.
    away: Leaf
    #: int32 [] each: the maximum of all servers' work (IDLE, BUSY, DECODING), and the batch of
    #: experts that all servers are ready to apply, or 0.
    work: Leaf
    loaded: Leaf


class Outcome(NamedTuple):
    """One device's results that the host reads after every step."""

    #: int32 [d], float32 [d], int32 [d]: the sampled token, its logprob and rank.
    token: Leaf
    logprob: Leaf
    rank: Leaf
    #: bool []: whether any of the step's tokens failed, `Extras.failed`.
    any_failed: Leaf
    crossed: Crossed


class Extras(NamedTuple):
    """One device's results that the host reads only if needed."""

    #: int32 [d, 20] and float32 [d, 20]: most likely tokens.
    top_token: Leaf
    top_logprob: Leaf
    #: uint16 [t, l, k]: the experts chosen for each token.
    routes: Leaf
    #: bool [t]: tokens that needed an expert that no server provided.
    failed: Leaf
    #: float32 [d, v].
    logits: Leaf
    #: `score` of the step's tokens; None if nobody asks for logprobs of a prompt.
    scores: Sampled | None


class Record(NamedTuple):
    """What the layers of a step record, each at its own index; l MoE layers."""

    #: `Extras.routes` and `.failed`.
    routes: Leaf
    failed: Leaf
    #: None if a single server steps.
    crossed: Crossed | None


def token_slice(bucket: Bucket, config: EngineConfig, row: Row) -> slice:
    """The slice of the batch's tokens that belong to the row."""
    decode, _ = bucket
    begin = row.index
    if row.index >= decode:
        begin = decode + (row.index - decode) * config.block_size
    return slice(begin, begin + len(row.tokens))


def next_tokens(rows: tuple[Row, ...], bucket: Bucket, config: EngineConfig) -> np.ndarray:
    """int32 [t]: the prompt's token after each of a step's tokens, where logprobs are wanted."""
    decode, slices = bucket
    token = np.zeros(decode + slices * config.block_size, np.int32)
    for row in rows:
        if row.sequence.prompt_logprobs is not None:
            following = row.sequence.prompt_token_ids[row.start + 1 :][: len(row.tokens)]
            begin = token_slice(bucket, config, row).start
            token[begin : begin + len(following)] = following
    return token


def sampling_rows(rows: tuple[Row, ...]) -> list[Row]:
    """The rows of one device that have a token sampled."""
    return [row for row in rows if row.sample]


def host_batch(
    rows: tuple[Row, ...], bucket: Bucket, config: EngineConfig, status: int
) -> StepBatch:
    """The batch of one device, in numpy.

    Args:
        rows: the rows in use.
        bucket: the bucket of the step.
        config: provides block_size and max_blocks.
        status: `lock_step_messages.status_word` for the other servers, made of IDLE, BUSY or
            DECODING and the number of a batch of experts.
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
        # Indices count separately for decode rows and slice rows.
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
    """The batch's rows for the attention: decode rows and slice rows."""
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
    """All leaves of a numpy tree as one int32 vector, for one transfer instead of many."""
    leaves = [
        leaf.astype(np.int32) if leaf.dtype == bool else leaf for leaf in jax.tree.leaves(tree)
    ]
    return np.concatenate([leaf.reshape(-1).view(np.int32) for leaf in leaves])


def unpack(vector: Array, like: Any) -> Any:
    """Inverse of `pack` for use inside a step; `like` has the leaves' shapes and dtypes."""
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
    """`pack` for use inside a step."""
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
    """Static properties that all parts of a bucket's step are compiled for."""

    bucket: Bucket
    config: EngineConfig
    exchange: TracedExchange | HostCalls
    #: Number of MoE layers, of experts per layer, and of experts per token.
    moe_layers: int
    num_experts: int
    top_k: int

    @property
    def tokens(self) -> int:
        decode, slices = self.bucket
        return decode + slices * self.config.block_size

    def batch(self, packed: Array) -> StepBatch:
        """Unpack a batch of `host_batch`; XLA drops the fields that a part does not use."""
        return unpack(packed, host_batch((), self.bucket, self.config, IDLE))

    def rows(self, batch: StepBatch) -> tuple[Rows, ...]:
        return batch_rows(batch, self.bucket, self.config.block_size)

    def groups(self, rows: tuple[Rows, ...]) -> list[tuple[slice, tuple[Rows, ...]]]:
        """The tokens and rows of each group of a layer.

        With one group, all tokens and rows. With several, each group has a part of the slice rows,
        and the first group also has the decode rows.
        """
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
    """Begin a step.

    Returns:
        The first layer's input, the rotations, the packed sampling state, and an empty record.
    """
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
    """Compute a layer.

    Args:
        layer: a layer of the trunk.
        experts, links, record: None for a layer without routed experts.

    Returns:
        The layer's output, its cache, its link memory, and the record.
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
    """Compute a layer with routed experts, one group of tokens after the other.

    While a group's calls are in flight, the device computes what does not depend on them: the next
    group up to its own calls, then everything in the layer other than the routed experts.

    Returns:
        hidden [t, d], the experts chosen, int32 [t, k], the failed tokens, bool [t], and the
        traffic; and the cache.
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
    """The record with a layer's routes and failed rows added."""
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
    """Compute a layer up to its routed experts, which the host computes.

    Args:
        failed_t: `Record.failed`.

    Returns:
        The input of `finish_layer`; the routed tokens, with hidden states in float32; bool [t], the
        rows to compute experts for; and the cache.
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
    """Finish a layer from the sums of its routed experts.

    Args:
        number: int32 [], the layer's index among the layers with routed experts.

    Returns:
        The layer's output, and the record.
    """
    hidden_td, beside_td = rest
    hidden_td = layer.finish(hidden_td, beside_td, sums_td)
    return hidden_td, _recorded(record, number, expert_tk, failed_t)


def logits(
    form: Form, trunk: Trunk, hidden_td: Array, packed: Array, counts_le: Array, record: Record
) -> tuple[Array, Array, Array]:
    """Compute the logits, and count the step's expert calls.

    Returns:
        Logits after the tokens `StepBatch.last`, float32 [d, v]; `Memory.counts` plus the calls of
        this step's tokens, without failed tokens; whether any token failed, bool [].
    """
    batch = form.batch(packed)
    counted_t = form.valid(form.rows(batch)) & ~record.failed
    routes_tlk = record.routes.astype(jnp.int32)
    layer_l1 = jnp.arange(form.moe_layers)[:, None]
    calls_tlk = jnp.broadcast_to(counted_t[:, None, None], routes_tlk.shape).astype(jnp.int32)
    counts_le = counts_le.at[layer_l1, routes_tlk].add(calls_tlk, mode="promise_in_bounds")
    return trunk.logits(hidden_td[batch.last]), counts_le, record.failed.any()


def score(trunk: Trunk, hidden_td: Array, token_t: Array) -> Sampled:
    """Score given tokens, one after each of a step's tokens: logprobs of prompts.

    Args:
        hidden_td: output of the last layer.
        token_t: int32 [t].
    """

    count, width = hidden_td.shape
    # The logits of all tokens at once would need much memory.
    hidden_npd = jnp.pad(hidden_td, ((0, -count % _SCORED), (0, 0))).reshape(-1, _SCORED, width)
    token_np = jnp.pad(token_t, (0, -count % _SCORED)).reshape(-1, _SCORED)
    parts = lax.map(lambda part: scored(trunk.logits(part[0]), part[1]), (hidden_npd, token_np))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], parts)


def choose(
    longest: int,
    logits_dv: Array,
    packed_state: Array,
    packed_adjustments: Array,
    allowed_dw: Array,
    any_failed: Array,
    crossed: Crossed | None,
) -> tuple[Array, Array, Array]:
    """Sample the next tokens.

    Args:
        longest: maximum number of tokens of a sequence.
        allowed_dw: see `sample`.
        crossed: None if a single server steps.

    Returns:
        The fields of `Outcome`, packed; `Extras.top_token` and `.top_logprob`.
    """
    state = unpack(packed_state, sampling_state({}, len(logits_dv)))
    changes = unpack(packed_adjustments, adjustments({}, len(logits_dv), longest))
    sampled = sample(logits_dv, state, changes, allowed_dw)
    outcome = pack_traced((sampled.token, sampled.logprob, sampled.rank, any_failed, crossed))
    return outcome, sampled.top_token, sampled.top_logprob
