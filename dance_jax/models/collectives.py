"""Transport of rows between servers by JAX collectives; runs on GPUs, TPUs and CPUs.

JAX's all-to-all moves parts of equal size, and a collective has a static size, so rows are split
into messages whose number depends on the routing. Dispatch begins with a *first* message to every
server. This message carries the sender's row counts, so that every server knows every size, and a
few rows. How many rows is chosen from a ladder by the counts of earlier steps (the credit), which
all servers know too. A layer whose tokens need no other server sends only the counts. The
remaining rows, and all sums on their way back, go in chunks, one pair of servers after another.

Data dependencies fix the order of the messages: XLA may reorder independent collectives, and two
processes that disagree on the order would deadlock.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.models.lock_step_messages import (
    Exchanged,
    Incoming,
    Outgoing,
    agree,
    join_columns,
    row_bytes,
    split_columns,
)
from dance_jax.models.topology import AXIS, Topology, from_gateway

#: Possible numbers of rows in a first message.
LADDER = (0, 2, 4)
#: Rows of each further message: large messages as long as they are full, then small ones.
CHUNKS = (32, 4)
#: Number of steps after which the first message on a quiet link has one row less.
CREDIT_STEPS = 8


@dataclasses.dataclass(frozen=True)
class Collectives:
    """`Transport` by ppermute."""

    name = "collectives"

    def memory(self, layers: int) -> np.ndarray:
        """Credit, int32 [l]: expected rows of the busiest link, in units of 1/CREDIT_STEPS rows."""
        return np.zeros(layers, np.int32)

    def dispatch(
        self, topology: Topology, outgoing: Outgoing, status: Array, memory: Array
    ) -> tuple[Incoming, Exchanged]:
        num, rank = topology.num_servers, topology.rank
        like = (outgoing.expert[0], outgoing.weight, *outgoing.hidden)
        packed = {
            peer: _to_front(join_columns((outgoing.expert[peer], *like[1:])), outgoing.goes[peer])
            for peer in topology.peers
        }
        counts_n = outgoing.goes.sum(1, dtype=jnp.int32)
        header = jnp.concatenate([counts_n, status[None]])
        rung = _rung((memory + CREDIT_STEPS - 1) // CREDIT_STEPS)
        headers, firsts, order = _first_round(topology, packed, rung, header)
        headers, firsts = from_gateway(topology, (headers, firsts))
        heads = jnp.stack([headers.get(n, header) for n in range(num)])
        rows = heads[:, :num]
        first = jnp.array(LADDER)[rung].astype(jnp.int32)

        box = jnp.zeros((topology.room + CHUNKS[0], row_bytes(like)), jnp.uint8)
        place = jnp.int32(0)
        # Peer after peer: the next peer's rows overwrite the padding of the last chunk.
        for peer in topology.peers:
            box = lax.dynamic_update_slice(box, firsts[peer], (place, 0))
            link = _Link(topology, peer, rows, first, jnp.int32(0), place, relay=True)
            box, order = link.swap(packed[peer], box, order)
            place += rows[peer, rank]
        expert, weight, *hidden = split_columns(box, like)
        largest = rows.max()
        work, loaded = agree(heads[:, num])
        sum_bytes = np.dtype(np.float32).itemsize * outgoing.hidden[0].shape[-1]
        exchanged = Exchanged(
            # Including the order makes the messages with sums depend on these messages.
            rows=rows + order,
            bytes=wire_bytes(rows, first, row_bytes(like), sum_bytes),
            away=outgoing.goes.any(0).sum(dtype=jnp.int32),
            work=work,
            loaded=loaded,
            memory=jnp.maximum(jnp.minimum(largest, LADDER[-1]) * CREDIT_STEPS, memory - 1),
        )
        return Incoming(expert, weight, tuple(hidden)), exchanged

    def give_back(self, topology: Topology, sums: Array, goes: Array, rows: Array) -> Array:
        packed = join_columns((sums,))
        returned = jnp.zeros((*goes.shape, packed.shape[1]), jnp.uint8)
        empty = jnp.zeros((goes.shape[1] + CHUNKS[0], packed.shape[1]), jnp.uint8)
        place, order = jnp.int32(0), jnp.int32(0)
        for peer in topology.peers:
            link = _Link(topology, peer, rows.T, jnp.int32(0), place, jnp.int32(0), relay=False)
            box, order = link.swap(packed, empty, order)
            place += rows[peer, topology.rank]
            position_g = jnp.maximum(jnp.cumsum(goes[peer].astype(jnp.int32)) - 1, 0)
            returned = returned.at[peer].set(box[position_g])
        return split_columns(returned, (sums,))[0]


def _to_front(rows_gw: Array, goes_g: Array) -> Array:
    """Move the rows that are sent to the front, and pad so that whole messages can be sliced."""
    source = jnp.nonzero(goes_g, size=goes_g.shape[0], fill_value=0)[0]
    return jnp.pad(rows_gw[source], ((0, CHUNKS[0] + LADDER[-1]), (0, 0)))


def _after(message: Array, order: Array) -> Array:
    """The next `order`: 0, computed from `message` so that the compiler cannot remove it."""
    return order + jnp.minimum(message.ravel()[0].astype(jnp.int32), 0)


def _rung(rows: Array) -> Array:
    """int32 []: index of the first entry of LADDER with room for `rows`, or of the last entry."""
    return jnp.sum(jnp.array(LADDER[:-1]) < rows, dtype=jnp.int32)


def _first_round(
    topology: Topology, packed: dict[int, Array], rung: Array, header: Array
) -> tuple[dict[int, Array], dict[int, Array], Array]:
    """Every gateway sends `header` and LADDER[rung] rows to all others, one shift at a time.

    Returns:
        The header received from each peer; the rows received from each peer, uint8
        [LADDER[-1], w]; and the order.
    """
    num, rank = topology.num_servers, topology.rank
    (head,) = join_columns((header[None],))
    headers, firsts, order = {}, {}, jnp.int32(0)
    for shift in range(1, num):
        target, source = (rank + shift) % num, (rank - shift) % num
        width = packed[target].shape[-1]
        pairs = [(topology.gateway(n), topology.gateway((n + shift) % num)) for n in range(num)]
        message = jnp.concatenate([head, packed[target][: LADDER[-1]].ravel()])
        message += order.astype(jnp.uint8)

        def send(message: Array, size: int, pairs=pairs) -> Array:
            got = lax.ppermute(message[:size], AXIS, pairs)
            return jnp.pad(got, (0, message.shape[0] - size))

        branches = [functools.partial(send, size=head.shape[0] + rows * width) for rows in LADDER]
        message = lax.switch(rung, branches, message)
        order = _after(message, order)
        (headers[source],) = split_columns(message[: head.shape[0]], (header,))
        firsts[source] = message[head.shape[0] :].reshape(LADDER[-1], width)
    return headers, firsts, order


@dataclasses.dataclass(frozen=True)
class _Link:
    """Exchange with one peer of the rows after the first message.

    Messages go in both directions at once as long as both servers have rows, then in one.
    """

    topology: Topology
    peer: int
    #: int32 [n, n], rows from server to server; int32 [] `first` of them were in first messages.
    rows: Array
    first: Array
    #: int32 [], where the peer's rows begin in the sent array, and in the received array.
    out_place: Array
    in_place: Array
    #: True if the gateway copies received rows to its siblings.
    relay: bool

    def swap(self, packed: Array, box: Array, order: Array) -> tuple[Array, Array]:
        """Send rows of `packed` and receive into `box`, both uint8; return `box` and the order."""
        start = jnp.broadcast_to(self.first, self.rows.shape)
        for size in CHUNKS:
            left = jnp.maximum(self.rows - start, 0)
            chunks = left // size if size != CHUNKS[-1] else (left + size - 1) // size
            box, order = self._swap_chunks(packed, box, start, chunks, size, order)
            start += chunks * size
        return box, order

    def _swap_chunks(
        self, packed: Array, box: Array, start: Array, chunks: Array, size: int, order: Array
    ) -> tuple[Array, Array]:
        """Exchange `chunks` [n, n] messages of `size` rows each, starting at row `start` [n, n]."""
        rank, peer, topology = self.topology.rank, self.peer, self.topology
        here, there = topology.gateway(rank), topology.gateway(peer)
        sent, received = chunks[rank, peer], chunks[peer, rank]
        out_start = self.out_place + start[rank, peer]
        in_start = self.in_place + start[peer, rank]
        both = jnp.minimum(sent, received)

        def message(i):
            return lax.dynamic_slice(packed, (out_start + i * size, 0), (size, packed.shape[1]))

        def keep(box, got, i):
            got = from_gateway(topology, got) if self.relay else got
            return lax.dynamic_update_slice(box, got, (in_start + i * size, 0))

        def swap(i, carry):
            box, order = carry
            got = lax.ppermute(message(i + order), AXIS, [(here, there), (there, here)])
            return keep(box, got, i), _after(got, order)

        def push(i, order):
            return _after(lax.ppermute(message(i + order), AXIS, [(here, there)]), order)

        def pull(i, carry):
            box, order = carry
            got = jnp.broadcast_to((i + order).astype(jnp.uint8), (size, packed.shape[1]))
            got = lax.ppermute(got, AXIS, [(there, here)])
            return keep(box, got, i), _after(got, order)

        box, order = lax.fori_loop(order, both, swap, (box, order))
        order = lax.fori_loop(both + order, sent, push, order)
        return lax.fori_loop(both + order, received, pull, (box, order))


def wire_bytes(rows_nn: Array, first: Array, row: int, reply: int) -> Array:
    """Payload bytes for each directed pair of servers.

    Args:
        rows_nn: int32 [n, n], as in `Exchanged`.
        first: int32 [], rows of the first message.
        row, reply: bytes of a row, and of the sum that is sent back for a row.

    Returns:
        int32 [n, n], bytes from server (first axis) to server (second axis).
    """
    num = rows_nn.shape[-1]

    def padded(count: Array) -> Array:
        return -(-jnp.maximum(count, 0) // CHUNKS[-1]) * CHUNKS[-1]

    header = 4 * (num + 1)
    sent = header + (first + padded(rows_nn - first)) * row + padded(rows_nn.T) * reply
    return sent * (1 - jnp.eye(num, dtype=jnp.int32))
