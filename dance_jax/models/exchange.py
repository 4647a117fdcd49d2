"""The exchange of one MoE layer: hidden states to the servers that hold experts, sums back.

Every process compiles its own program of the one step, with its own token count and pool size;
what must agree is the sequence of messages between two processes, and that is written here.

A server's first device is its gateway: only gateways use the slow links, so a token crosses a
link once per server it needs. Inside a server the devices gather their tokens, each computes the
experts it holds, and the sums are scattered back.

Sizes follow the routing. A phase (dispatch, return) is a *first* message to every server, of a
few rows chosen from a ladder, then, for a pair of servers with more to say, chunks. The first
dispatch message carries the sender's row counts to all servers, so that every server knows every
size. Its ladder rung comes from the counts of earlier steps (`Exchanged.credit`), which all servers
know as well: decode needs two rounds a layer, and a layer whose tokens stay at home sends a
header.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.models.config import ModelConfig
from dance_jax.models.experts import Pool, block_rows, grouped_ffn
from dance_jax.placement.visit import choose_servers

#: Mesh axis over all devices of all servers, in rank order.
AXIS = "device"
#: Rows of a first message.
LADDER = (0, 2, 8)
#: Rows of each further message.
CHUNK = 16
#: A quiet link keeps a row of its first message for this many steps.
CREDIT_STEPS = 8
#: Marks "no expert" in a packed row.
NO_EXPERT = 0xFFFF


@dataclasses.dataclass(frozen=True)
class Topology:
    """What one process knows of the cluster at compile time."""

    #: This server's position in the hosts file.
    rank: int
    #: Devices of each server.
    devices: tuple[int, ...]
    #: Most tokens one device of any server carries in one step.
    max_step_tokens: int

    @property
    def num_servers(self) -> int:
        return len(self.devices)

    @property
    def siblings(self) -> int:
        """Devices of this server."""
        return self.devices[self.rank]

    @property
    def peers(self) -> tuple[int, ...]:
        return tuple(n for n in range(self.num_servers) if n != self.rank)

    def gateway(self, server: int) -> int:
        """Mesh position of a server's first device."""
        return sum(self.devices[:server])

    def max_rows(self, server: int) -> int:
        """Most rows `server` can send to another in one layer."""
        return self.devices[server] * self.max_step_tokens


class Tables(NamedTuple):
    """Where experts are, as arguments of the step. Per device, l MoE layers, e experts."""

    #: int32 [l, e], bit n set when server n holds the expert.
    holders: Array
    #: int32 [l, e], slot on this device, -1 when it is not here.
    slot_of: Array


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


class Exchange:
    """The MoE computation of one layer across servers, inside shard_map over AXIS."""

    def __init__(self, topology: Topology, pool: Pool, tables: Tables, active: Array):
        """`active`: bool [], this server has work."""
        self.topology = topology
        self.pool = pool
        self.tables = tables
        self.active = active

    def __call__(
        self,
        layer: Array,
        x_td: Array,
        expert_tk: Array,
        weight_tk: Array,
        valid_t: Array,
        credit: Array,
    ) -> tuple[Array, Exchanged]:
        """Weighted sums of routed experts for this device's tokens of MoE layer `layer`, int32 [].

        Args:
            x_td: [t, d] hidden states, in the wire's dtype.
            expert_tk: int32 [t, k]; weight_tk: float32 [t, k].
            valid_t: bool [t], False for padding, which is routed nowhere.
            credit: int32 [], `Exchanged.credit` of this layer's last step.

        Returns:
            float32 [t, d] and the layer's traffic.
        """
        topology = self.topology
        d = x_td.shape[1]
        k = expert_tk.shape[1]
        holders_e, slot_e = self.tables.holders[layer], self.tables.slot_of[layer]
        expert_tk = jnp.where(valid_t[:, None], expert_tk, NO_EXPERT)
        rows = _gather_siblings(topology, pack_rows(x_td, expert_tk, weight_tk))
        x_gd, expert_gk, weight_gk = unpack_rows(rows, d, k, x_td.dtype)

        known_gk = expert_gk != NO_EXPERT
        holders_gk = holders_e[jnp.where(known_gk, expert_gk, 0)]
        here_gk = ((holders_gk >> topology.rank) & 1) == 1
        visit_gk = choose_servers(holders_gk, known_gk & ~here_gk, topology.num_servers)
        local_gk = jnp.where(known_gk & here_gk, expert_gk, NO_EXPERT)

        if topology.num_servers == 1:
            y_gd = self._ffn(x_gd, local_gk, weight_gk, slot_e)
            zero = jnp.int32(0)
            traffic = Exchanged(jnp.zeros((1, 1), jnp.int32), zero, zero, self.active)
            return _scatter_siblings(topology, y_gd), traffic

        outgoing = {}
        for peer in topology.peers:
            expert_gk_peer = jnp.where(visit_gk == peer, expert_gk, NO_EXPERT)
            outgoing[peer] = _Outgoing.select(
                pack_rows(x_gd, expert_gk_peer, weight_gk), expert_gk_peer
            )
        counts_n = jnp.stack(
            [
                outgoing[n].count if n in outgoing else jnp.int32(0)
                for n in range(topology.num_servers)
            ]
        )
        inbox, traffic, order = _dispatch(topology, outgoing, counts_n, self.active, credit)

        def run_experts(limit: int | None) -> tuple[Array, list[Array]]:
            """Sums for this server's tokens, and for the first `limit` rows of each peer."""
            x, expert, weight = [x_gd], [local_gk], [weight_gk]
            for peer in topology.peers:
                x_rd, expert_rk, weight_rk = unpack_rows(inbox[peer][:limit], d, k, x_td.dtype)
                present_r = jnp.arange(x_rd.shape[0]) < traffic.rows[peer, topology.rank]
                x.append(x_rd)
                expert.append(jnp.where(present_r[:, None], expert_rk, NO_EXPERT))
                weight.append(weight_rk)
            y_nd = self._ffn(*map(jnp.concatenate, (x, expert, weight)), slot_e)
            y_gd, *y_peers = jnp.split(y_nd, np.cumsum([len(part) for part in x])[:-1])
            room = [
                len(inbox[peer]) - len(y) for peer, y in zip(topology.peers, y_peers, strict=True)
            ]
            return y_gd, [jnp.pad(y, ((0, r), (0, 0))) for y, r in zip(y_peers, room, strict=True)]

        # In decode the few rows that come must not cost what the room for a prefill's costs.
        few = traffic.rows.max() <= LADDER[-1]
        y_gd, sums = lax.cond(few, lambda: run_experts(LADDER[-1]), lambda: run_experts(None))
        replies = {
            peer: to_lanes(
                _sum_at_gateway(topology, y_rd, traffic.rows[peer, topology.rank]).astype(
                    x_td.dtype
                )
            )
            for peer, y_rd in zip(topology.peers, sums, strict=True)
        }
        returned = _return(topology, replies, traffic.rows, order)
        is_gateway = lax.axis_index(AXIS) == topology.gateway(topology.rank)
        for peer in topology.peers:
            partial_gd = from_lanes(returned[peer], x_td.dtype)[outgoing[peer].position]
            arrived_g = outgoing[peer].chosen & is_gateway
            y_gd += jnp.where(arrived_g[:, None], partial_gd.astype(jnp.float32), 0.0)
        return _scatter_siblings(topology, y_gd), traffic

    def _ffn(self, x_nd: Array, expert_nk: Array, weight_nk: Array, slot_e: Array) -> Array:
        known_nk = expert_nk != NO_EXPERT
        slot_nk = jnp.where(known_nk, slot_e[jnp.where(known_nk, expert_nk, 0)], -1)
        block = block_rows(x_nd.shape[0] * expert_nk.shape[1], self.pool.w_gate.shape[0])
        return grouped_ffn(self.pool, x_nd, slot_nk, weight_nk, block)


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


class _Outgoing(NamedTuple):
    """Rows for one peer, packed to the front."""

    #: uint16 [g + padding, lanes]
    lanes: Array
    #: int32 [], how many rows go.
    count: Array
    #: bool [g], the rows that go; int32 [g], their place in `lanes`.
    chosen: Array
    position: Array

    @classmethod
    def select(cls, lanes: Array, expert_gk: Array) -> _Outgoing:
        chosen = (expert_gk != NO_EXPERT).any(-1)
        position = jnp.cumsum(chosen.astype(jnp.int32)) - 1
        source = jnp.nonzero(chosen, size=chosen.shape[0], fill_value=0)[0]
        padded = jnp.pad(lanes[source], ((0, CHUNK + LADDER[-1]), (0, 0)))
        return cls(padded, position[-1] + 1, chosen, jnp.maximum(position, 0))


# Messages between servers. `order` is an int32 that is always 0 at run time and ties each message
# to the one before it: XLA is free to reorder independent collectives, and two processes that
# disagree on the order wait for each other for ever.


def _after(lanes: Array, order: Array) -> Array:
    """The next `order`: depends on `lanes`, is 0, in a way the compiler cannot see through."""
    return order + jnp.minimum(lanes.ravel()[0].astype(jnp.int32), 0)


def _dispatch(
    topology: Topology,
    outgoing: dict[int, _Outgoing],
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
    heads, firsts = _from_gateway(topology, (heads, firsts))
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
        room = topology.max_rows(peer) + CHUNK + LADDER[-1]
        lanes = firsts[peer].shape[-1]
        inbox[peer] = jnp.zeros((room, lanes), jnp.uint16).at[: LADDER[-1]].set(firsts[peer])
    lanes = {peer: out.lanes for peer, out in outgoing.items()}
    inbox, order = _chunks(topology, lanes, inbox, rows, first, order, relay=True)
    return inbox, traffic, order


def _return(
    topology: Topology, replies: dict[int, Array], rows: Array, order: Array
) -> dict[int, Array]:
    """Send each peer the sums of the rows it sent; returns sums per peer, in the order sent."""
    back = rows.T
    rung = _rung(rows.max())
    first = jnp.array(LADDER)[rung].astype(jnp.int32)
    _, firsts, order = _first_round(topology, replies, rung, None, order)
    inbox = {}
    for peer in topology.peers:
        lanes = firsts[peer].shape[-1]
        room = topology.max_rows(topology.rank) + CHUNK + LADDER[-1]
        inbox[peer] = jnp.zeros((room, lanes), jnp.uint16).at[: LADDER[-1]].set(firsts[peer])
    inbox, _ = _chunks(topology, replies, inbox, back, first, order, relay=False)
    return inbox


def _rung(rows: Array) -> Array:
    """int32 []: the first rung of LADDER with so much room, or the last."""
    return jnp.sum(jnp.array(LADDER[:-1]) < rows, dtype=jnp.int32)


def _first_round(
    topology: Topology, outgoing: dict[int, Array], rung: Array, header: Array | None, order: Array
) -> tuple[dict[int, Array], dict[int, Array], Array]:
    """All gateways send LADDER[rung] rows (behind `header`) to all others, one shift at a time.

    Returns per peer the header received and uint16 [LADDER[-1], lanes] of rows, and the order.
    """
    num, rank = topology.num_servers, topology.rank
    head = 0 if header is None else header.shape[0]
    heads, firsts = {}, {}
    for shift in range(1, num):
        target, source = (rank + shift) % num, (rank - shift) % num
        lanes = outgoing[target].shape[-1]
        pairs = [(topology.gateway(n), topology.gateway((n + shift) % num)) for n in range(num)]
        message = outgoing[target][: LADDER[-1]].ravel()
        if header is not None:
            message = jnp.concatenate([header, message])
        message += order.astype(jnp.uint16)

        def send(message: Array, size: int, pairs=pairs) -> Array:
            got = lax.ppermute(message[:size], AXIS, pairs) if size else message[:0]
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
    rank = topology.rank
    chunks = (jnp.maximum(rows - first, 0) + CHUNK - 1) // CHUNK
    inbox = dict(inbox)
    for peer in topology.peers:  # ascending: pairs (a, b) in lexicographic order for both ends
        here, there = topology.gateway(rank), topology.gateway(peer)
        lanes = outgoing[peer].shape[-1]
        sent, received = chunks[rank, peer], chunks[peer, rank]
        both = jnp.minimum(sent, received)

        def message(i, peer=peer, lanes=lanes):
            return lax.dynamic_slice(outgoing[peer], (first + i * CHUNK, 0), (CHUNK, lanes))

        def keep(box, got, i):
            got = _from_gateway(topology, got) if relay else got
            return lax.dynamic_update_slice(box, got, (first + i * CHUNK, 0))

        def swap(i, carry, message=message, pairs=((here, there), (there, here))):
            box, order = carry
            got = lax.ppermute(message(i + order), AXIS, pairs)
            return keep(box, got, i), _after(got, order)

        def push(i, order, message=message, pairs=((here, there),)):
            return _after(lax.ppermute(message(i + order), AXIS, pairs), order)

        def pull(i, carry, lanes=lanes, pairs=((there, here),)):
            box, order = carry
            got = jnp.broadcast_to((i + order).astype(jnp.uint16), (CHUNK, lanes))
            got = lax.ppermute(got, AXIS, pairs)
            return keep(box, got, i), _after(got, order)

        box, order = lax.fori_loop(order, both, swap, (inbox[peer], order))
        order = lax.fori_loop(both + order, sent, push, order)
        inbox[peer], order = lax.fori_loop(both + order, received, pull, (box, order))
    return inbox, order


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
    ladder = np.array(LADDER)
    largest = np.minimum(rows.max((-2, -1)), LADDER[-1])
    reply = ladder[np.searchsorted(ladder, largest)][..., None, None]
    first = np.asarray(first, np.int64)[..., None, None]

    def padded(count: np.ndarray, head: np.ndarray) -> np.ndarray:
        return head + -(-np.maximum(count - head, 0) // CHUNK) * CHUNK

    sent = padded(rows, first) * lanes + (num + 1)
    sent = sent + padded(np.swapaxes(rows, -1, -2), reply) * reply_lanes
    return 2 * sent * (1 - np.eye(num, dtype=np.int64))


# Inside a server: its devices over their fast local links.


def _ring(topology: Topology, shift: int) -> list[tuple[int, int]]:
    base, size = topology.gateway(topology.rank), topology.siblings
    return [(base + i, base + (i + shift) % size) for i in range(size)]


def _local_index(topology: Topology) -> Array:
    return lax.axis_index(AXIS) - topology.gateway(topology.rank)


def _gather_siblings(topology: Topology, x_td: Array) -> Array:
    """[t, w] of each device -> [devices * t, w] of all, in device order, on every device."""
    size = topology.siblings
    if size == 1:
        return x_td
    me, t = _local_index(topology), x_td.shape[0]
    out = jnp.zeros((size * t, x_td.shape[1]), x_td.dtype)
    out = lax.dynamic_update_slice(out, x_td, (me * t, 0))
    for shift in range(1, size):
        got = lax.ppermute(x_td, AXIS, _ring(topology, shift))
        out = lax.dynamic_update_slice(out, got, ((me - shift) % size * t, 0))
    return out


def _scatter_siblings(topology: Topology, y_gd: Array) -> Array:
    """Sum over devices of [devices * t, d], of which each device keeps its own [t, d]."""
    size = topology.siblings
    if size == 1:
        return y_gd
    me, t = _local_index(topology), y_gd.shape[0] // size
    total = lax.dynamic_slice_in_dim(y_gd, me * t, t)
    for shift in range(1, size):
        part = lax.dynamic_slice_in_dim(y_gd, (me + shift) % size * t, t)
        total += lax.ppermute(part, AXIS, _ring(topology, shift))
    return total


def _sum_at_gateway(topology: Topology, y_rd: Array, count: Array) -> Array:
    """Sum of the first `count` rows over the devices, right on the gateway."""
    base = topology.gateway(topology.rank)

    def add(i, y_rd):
        part = lax.dynamic_slice(y_rd, (i * CHUNK, 0), (CHUNK, y_rd.shape[1]))
        total = part
        for sibling in range(1, topology.siblings):
            total += lax.ppermute(part, AXIS, [(base + sibling, base)])
        return lax.dynamic_update_slice(y_rd, total, (i * CHUNK, 0))

    if topology.siblings == 1:
        return y_rd
    return lax.fori_loop(0, (count + CHUNK - 1) // CHUNK, add, y_rd)


def _from_gateway(topology: Topology, tree):
    """The gateway's arrays, on every device of the server."""
    if topology.siblings == 1:
        return tree
    base = topology.gateway(topology.rank)
    is_gateway = _local_index(topology) == 0

    def copy(x):
        out = jnp.where(is_gateway, x, jnp.zeros_like(x))
        for i in range(1, topology.siblings):
            got = lax.ppermute(x, AXIS, [(base, base + i)])
            out = jnp.where(_local_index(topology) == i, got, out)
        return out

    return jax.tree.map(copy, tree)
