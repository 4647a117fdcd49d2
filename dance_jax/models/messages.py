"""What crosses the links between servers: packed rows in messages whose sizes follow the routing.

Dispatch begins with a *first* message to every server: the sender's row counts, so that every
server knows every size, and a few rows, chosen from a ladder by the counts of earlier steps
(`Exchanged.credit`), which all servers know as well. A layer whose tokens stay at home sends the
counts alone. What is left, and all that returns, goes in chunks, pair of servers by pair.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.models.config import ModelConfig
from dance_jax.models.topology import AXIS, Topology, from_gateway

#: Rows of a first message.
LADDER = (0, 2, 4)
#: Rows of each further message: large ones while they fill, then small ones.
CHUNKS = (32, 4)
#: A quiet link keeps a row of its first message for this many steps.
CREDIT_STEPS = 8
#: Marks "no expert" in a packed row.
NO_EXPERT = 0xFFFF


class Exchanged(NamedTuple):
    """What one layer's exchange reports, known alike to all servers."""

    #: int32 [n, n], rows sent from server (first axis) to server (second axis).
    rows: Array
    #: int32 [], rows of the first dispatch message.
    first: Array
    #: int32 [], expected rows of the next step's largest link, in 1/CREDIT_STEPS rows.
    credit: Array
    #: bool [], some server reported work.
    active: Array


# Packed rows: uint16 lanes of hidden state, expert ids, weights.


def to_lanes(x: Array) -> Array:
    """[..., d] of a 2- or 4-byte dtype -> uint16 [..., d * bytes / 2]."""
    lanes = lax.bitcast_convert_type(x, jnp.uint16)
    return lanes if lanes.ndim == x.ndim else lanes.reshape(*x.shape[:-1], -1)


def from_lanes(lanes: Array, dtype: jnp.dtype) -> Array:
    """Inverse of `to_lanes`."""
    per_value = np.dtype(dtype).itemsize // 2
    if per_value > 1:
        lanes = lanes.reshape(*lanes.shape[:-1], -1, per_value)
    return lax.bitcast_convert_type(lanes, dtype)


def pack_rows(x_td: Array, expert_tk: Array, weight_tk: Array) -> Array:
    """uint16 [t, lanes]: hidden state, expert ids (NO_EXPERT: none) and float32 weights."""
    return jnp.concatenate([to_lanes(x_td), expert_tk.astype(jnp.uint16), to_lanes(weight_tk)], -1)


def unpack_rows(lanes: Array, d: int, k: int, dtype: jnp.dtype) -> tuple[Array, Array, Array]:
    """Inverse of `pack_rows`: [t, d], int32 [t, k], float32 [t, k]."""
    ids = lanes.shape[-1] - 3 * k
    x = from_lanes(lanes[:, :ids], dtype)
    return (
        x,
        lanes[:, ids : ids + k].astype(jnp.int32),
        from_lanes(lanes[:, ids + k :], jnp.float32),
    )


class Outgoing(NamedTuple):
    """Rows for one peer, packed to the front."""

    #: uint16 [g + padding, lanes]
    lanes: Array
    #: int32 [], how many rows go.
    count: Array
    #: bool [g], the rows that go; int32 [g], their place in `lanes`.
    chosen: Array
    position: Array

    @classmethod
    def select(cls, lanes: Array, expert_gk: Array) -> Outgoing:
        chosen = (expert_gk != NO_EXPERT).any(-1)
        position = jnp.cumsum(chosen.astype(jnp.int32)) - 1
        source = jnp.nonzero(chosen, size=chosen.shape[0], fill_value=0)[0]
        padded = jnp.pad(lanes[source], ((0, CHUNKS[0] + LADDER[-1]), (0, 0)))
        return cls(padded, position[-1] + 1, chosen, jnp.maximum(position, 0))


# Messages between servers. `order` is an int32 that is always 0 at run time and ties each message
# to the one before it: XLA is free to reorder independent collectives, and two processes that
# disagree on the order wait for each other for ever.


def _after(lanes: Array, order: Array) -> Array:
    """The next `order`: depends on `lanes`, is 0, in a way the compiler cannot see through."""
    return order + jnp.minimum(lanes.ravel()[0].astype(jnp.int32), 0)


def dispatch(
    topology: Topology,
    outgoing: dict[int, Outgoing],
    counts_n: Array,
    active: Array,
    credit: Array,
) -> tuple[dict[int, Array], Exchanged, Array]:
    """Send each peer its rows and everyone the counts; returns rows per peer, and the traffic."""
    num = topology.num_servers
    expected = (credit + CREDIT_STEPS - 1) // CREDIT_STEPS
    rung = _rung(expected)
    header = jnp.concatenate([counts_n, active.astype(jnp.int32)[None]]).astype(jnp.uint16)
    heads, firsts, order = _first_round(
        topology, {p: out.lanes for p, out in outgoing.items()}, rung, header, jnp.int32(0)
    )
    heads, firsts = from_gateway(topology, (heads, firsts))
    rows = jnp.stack([heads.get(n, header) for n in range(num)]).astype(jnp.int32)
    rows, actives = rows[:, :num], rows[:, num]
    first = jnp.array(LADDER)[rung].astype(jnp.int32)
    largest = rows.max()
    traffic = Exchanged(
        rows=rows,
        first=first,
        credit=jnp.maximum(jnp.minimum(largest, LADDER[-1]) * CREDIT_STEPS, credit - 1),
        active=actives.any(),
    )
    inbox = {}
    for peer in topology.peers:
        room = topology.max_rows(peer) + CHUNKS[0] + LADDER[-1]
        lanes = firsts[peer].shape[-1]
        inbox[peer] = jnp.zeros((room, lanes), jnp.uint16).at[: LADDER[-1]].set(firsts[peer])
    lanes = {peer: out.lanes for peer, out in outgoing.items()}
    inbox, order = _chunks(topology, lanes, inbox, rows, first, order, relay=True)
    return inbox, traffic, order


def give_back(
    topology: Topology, replies: dict[int, Array], rows: Array, order: Array
) -> dict[int, Array]:
    """Send each peer the sums of the rows it sent; returns sums per peer, in the order sent."""
    inbox = {
        peer: jnp.zeros((topology.max_rows(topology.rank) + CHUNKS[0], lanes.shape[1]), jnp.uint16)
        for peer, lanes in replies.items()
    }
    return _chunks(topology, replies, inbox, rows.T, jnp.int32(0), order, relay=False)[0]


def _rung(rows: Array) -> Array:
    """int32 []: the first rung of LADDER with so much room, or the last."""
    return jnp.sum(jnp.array(LADDER[:-1]) < rows, dtype=jnp.int32)


def _first_round(
    topology: Topology, outgoing: dict[int, Array], rung: Array, header: Array, order: Array
) -> tuple[dict[int, Array], dict[int, Array], Array]:
    """All gateways send LADDER[rung] rows (behind `header`) to all others, one shift at a time.

    Returns per peer the header received and uint16 [LADDER[-1], lanes] of rows, and the order.
    """
    num, rank = topology.num_servers, topology.rank
    head = header.shape[0]
    heads, firsts = {}, {}
    for shift in range(1, num):
        target, source = (rank + shift) % num, (rank - shift) % num
        lanes = outgoing[target].shape[-1]
        pairs = [(topology.gateway(n), topology.gateway((n + shift) % num)) for n in range(num)]
        message = jnp.concatenate([header, outgoing[target][: LADDER[-1]].ravel()])
        message += order.astype(jnp.uint16)

        def send(message: Array, size: int, pairs=pairs) -> Array:
            got = lax.ppermute(message[:size], AXIS, pairs)
            return jnp.pad(got, (0, message.shape[0] - size))

        sizes = [head + rows * lanes for rows in LADDER]
        branches = [functools.partial(send, size=size) for size in sizes]
        message = lax.switch(rung, branches, message)
        order = _after(message, order)
        heads[source] = message[:head]
        firsts[source] = message[head:].reshape(LADDER[-1], lanes)
    return heads, firsts, order


def _chunks(
    topology: Topology,
    outgoing: dict[int, Array],
    inbox: dict[int, Array],
    rows: Array,
    first: Array,
    order: Array,
    relay: bool,
) -> tuple[dict[int, Array], Array]:
    """What the first messages left, pair of servers by pair: both ways at once, then one way.

    Pairs come in one order on all servers, so that no two wait for each other. With `relay` the
    gateway hands what it receives to its siblings.
    """
    inbox = dict(inbox)
    start = jnp.broadcast_to(first, rows.shape)
    for size in CHUNKS:
        left = jnp.maximum(rows - start, 0)
        chunks = left // size if size != CHUNKS[-1] else (left + size - 1) // size
        for peer in topology.peers:  # ascending: both ends take pairs in lexicographic order
            inbox[peer], order = _swap_chunks(
                topology, peer, outgoing[peer], inbox[peer], start, chunks, size, order, relay
            )
        start += chunks * size
    return inbox, order


def _swap_chunks(
    topology: Topology,
    peer: int,
    lanes: Array,
    box: Array,
    start: Array,
    chunks: Array,
    size: int,
    order: Array,
    relay: bool,
) -> tuple[Array, Array]:
    """chunks [n, n] messages of `size` rows each, from row start [n, n] on, to and from `peer`."""
    rank = topology.rank
    here, there = topology.gateway(rank), topology.gateway(peer)
    sent, received = chunks[rank, peer], chunks[peer, rank]
    out_start, in_start = start[rank, peer], start[peer, rank]
    both = jnp.minimum(sent, received)

    def message(i):
        return lax.dynamic_slice(lanes, (out_start + i * size, 0), (size, lanes.shape[1]))

    def keep(box, got, i):
        got = from_gateway(topology, got) if relay else got
        return lax.dynamic_update_slice(box, got, (in_start + i * size, 0))

    def swap(i, carry):
        box, order = carry
        got = lax.ppermute(message(i + order), AXIS, [(here, there), (there, here)])
        return keep(box, got, i), _after(got, order)

    def push(i, order):
        return _after(lax.ppermute(message(i + order), AXIS, [(here, there)]), order)

    def pull(i, carry):
        box, order = carry
        got = jnp.broadcast_to((i + order).astype(jnp.uint16), (size, lanes.shape[1]))
        got = lax.ppermute(got, AXIS, [(there, here)])
        return keep(box, got, i), _after(got, order)

    box, order = lax.fori_loop(order, both, swap, (box, order))
    order = lax.fori_loop(both + order, sent, push, order)
    return lax.fori_loop(both + order, received, pull, (box, order))


def row_lanes(model: ModelConfig, dtype: str) -> tuple[int, int]:
    """uint16 lanes of a packed row, and of a reply row."""
    reply = model.hidden_size * jnp.dtype(dtype).itemsize // 2
    return reply + 3 * model.top_k, reply


def wire_bytes(rows: np.ndarray, first: np.ndarray, lanes: int, reply_lanes: int) -> np.ndarray:
    """Payload bytes per directed pair of servers that `Exchanged` stands for.

    Args:
        rows: int [..., n, n] and first: int [...], as in `Exchanged`.
        lanes, reply_lanes: uint16 lanes of a packed row and of a reply row.

    Returns:
        int64 [..., n, n], bytes from server (first axis) to server (second axis).
    """
    rows = np.asarray(rows, np.int64)
    num = rows.shape[-1]
    first = np.asarray(first, np.int64)[..., None, None]

    def padded(count: np.ndarray) -> np.ndarray:
        return -(-np.maximum(count, 0) // CHUNKS[-1]) * CHUNKS[-1]

    sent = (first + padded(rows - first)) * lanes + num + 1
    sent = sent + padded(np.swapaxes(rows, -1, -2)) * reply_lanes
    return 2 * sent * (1 - np.eye(num, dtype=np.int64))
