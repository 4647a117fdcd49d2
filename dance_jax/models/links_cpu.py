"""Rows between servers on CPU, over TCP connections of our own: native/links.cc.

XLA's collectives on CPU send equal parts, one after the other, with a handshake each. Here every
server's gateway has a connection to every other's, and a call sends to all and receives from all at
once what goes and nothing else: a layer is two rounds, and one where nothing goes.

The connections are made in Python and belong to the process; a compiled step knows nothing of them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import math
import socket
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dance_jax.models import native
from dance_jax.models.collectives import Collectives
from dance_jax.models.connections import Listener, mesh
from dance_jax.models.messages import (
    Columns,
    Exchanged,
    Incoming,
    Outgoing,
    Transport,
    agree,
    row_bytes,
)
from dance_jax.models.topology import Topology, local_index

log = logging.getLogger(__name__)

#: Bytes before the rows of a message.
HEAD_BYTES = 16
#: `seconds_per_byte` says nothing of fewer calls, or where the slope is not so many standard errors
#: above 0.
LEAST_CALLS, CERTAIN = 100, 4.0


@dataclasses.dataclass(frozen=True)
class Sockets:
    """The `Transport` over this process's open connections."""

    name = "sockets"

    def memory(self, layers: int) -> tuple[()]:
        return ()

    def dispatch(
        self, topology: Topology, outgoing: Outgoing, said: Array, memory: tuple[()]
    ) -> tuple[Incoming, Exchanged]:
        num, room = topology.num_servers, topology.room
        like = (outgoing.expert[0], outgoing.weight, *outgoing.hidden)
        results = [
            jax.ShapeDtypeStruct((num, num + 1), jnp.int32),
            *(jax.ShapeDtypeStruct((room, column.shape[1]), column.dtype) for column in like),
        ]
        operands = (said, outgoing.goes, outgoing.expert, outgoing.weight, *outgoing.hidden)
        heads, expert, weight, *hidden = _call("LinksDispatch", topology, results, *operands)
        rows = heads[:, :num]
        payload = payload_bytes(rows, row_bytes(like), row_bytes(outgoing.hidden))
        exchanged = Exchanged(rows, payload, *agree(heads[:, num]), memory)
        return Incoming(expert, weight, tuple(hidden)), exchanged

    def give_back(self, topology: Topology, sums: Columns, goes: Array, rows: Array) -> Columns:
        results = [
            jax.ShapeDtypeStruct((*goes.shape, column.shape[1]), column.dtype) for column in sums
        ]
        return tuple(_call("LinksReturn", topology, results, goes, rows, *sums))


def _call(
    symbol: str, topology: Topology, results: Sequence[jax.ShapeDtypeStruct], *operands: Array
) -> list[Array]:
    """A call of all devices of this server; all get what it brings."""
    handler = jax.ffi.ffi_call(native.target(symbol), results, has_side_effect=True)
    device = local_index(topology).astype(jnp.int32)
    return list(handler(device, *operands, devices=np.int64(topology.siblings)))


def payload_bytes(rows_nn: Array, row: int, reply: int) -> Array:
    """int32 [n, n]: payload bytes from server to server in a layer, sums included.

    Args:
        rows_nn: int32 [n, n], `Exchanged.rows`.
        row, reply: bytes of a row, and of its sum.
    """
    num = rows_nn.shape[0]
    out = HEAD_BYTES + 4 * (num + 1) + rows_nn * row
    back = rows_nn.T * reply + jnp.where(rows_nn.T > 0, HEAD_BYTES, 0)
    return (out + back) * (1 - jnp.eye(num, dtype=jnp.int32))


# Counters.


@dataclasses.dataclass(frozen=True)
class Moved:
    """Sums over calls that moved bytes, for the line of their seconds over their bytes.

    Seconds are those after the first bytes of the last peer; bytes are the payload of a call in its
    busier direction, to or from all peers.
    """

    calls: float = 0.0
    seconds: float = 0.0
    bytes: float = 0.0
    bytes_bytes: float = 0.0
    bytes_seconds: float = 0.0
    seconds_seconds: float = 0.0

    def __sub__(self, before: Moved) -> Moved:
        """The calls since then."""
        ours, theirs = dataclasses.astuple(self), dataclasses.astuple(before)
        return Moved(*(a - b for a, b in zip(ours, theirs, strict=True)))


@dataclasses.dataclass(frozen=True)
class Phase:
    """Time the gateway spent in the calls of one phase since the links were opened."""

    calls: int
    #: Seconds until the first bytes of the last peer came: what this server waited for others.
    waited_s: float
    #: What came then.
    moved: Moved

    @property
    def moved_s(self) -> float:
        """Seconds from then on."""
        return self.moved.seconds


@dataclasses.dataclass(frozen=True)
class Counters:
    """What this process's links did since they were opened."""

    dispatch: Phase
    give_back: Phase
    #: Payload bytes to and from each server, by rank.
    bytes_sent: tuple[int, ...]
    bytes_received: tuple[int, ...]


def counters(servers: int) -> Counters:
    """Of the open links between so many servers; all 0 where none are open."""
    timing, traffic = np.zeros((2, 8)), np.zeros((servers, 2), np.int64)
    library = native.library()
    if library is not None:
        library.LinksCounters(
            servers,
            timing.ctypes.data_as(ctypes.POINTER(ctypes.c_double)),
            traffic.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)),
        )
    dispatch, give_back = (
        Phase(int(calls), waited, Moved(*sums)) for calls, waited, *sums in timing.tolist()
    )
    sent, received = traffic.T.tolist()
    return Counters(dispatch, give_back, tuple(sent), tuple(received))


def seconds_per_byte(phases: Sequence[Moved]) -> float | None:
    """What a byte more takes through this server's links, by least squares; None: not known.

    Every phase has its own fixed part, all have one slope. It is known where it stands out of its
    own scatter: between servers of one machine, or where all calls are of a size, it does not.

    Args:
        phases: `Phase.moved` of the phases, or what they grew by over some time.
    """
    xx = xy = yy = 0.0
    free = -1
    for each in phases:
        if each.calls == 0:
            continue
        xx += each.bytes_bytes - each.bytes**2 / each.calls
        xy += each.bytes_seconds - each.bytes * each.seconds / each.calls
        yy += each.seconds_seconds - each.seconds**2 / each.calls
        free += each.calls - 1
    if free < LEAST_CALLS or xx <= 0 or xy <= 0:
        return None
    slope = xy / xx
    scatter = math.sqrt(max(yy - slope * xy, 0.0) / free / xx)
    return slope if slope > CERTAIN * scatter else None


# Connections.


def connect(
    rank: int,
    names: Sequence[str],
    listener: Listener,
    endpoints: Sequence[str],
    key: bytes,
    *,
    usable: bool,
) -> Transport:
    """Connects this server with all others; they do it at the same time.

    Args:
        rank: this server's.
        names, endpoints: of all servers, by rank.
        listener: this server's.
        key: secret of the servers.
        usable: all servers have the C++ library; else all take collectives.

    Raises:
        RuntimeError: a server cannot be reached, did not come in time, or has another key.
    """
    if len(names) == 1:
        return Collectives()
    if not usable:
        log.warning(
            "servers exchange rows by collectives, slower: not all have CPUs and C++ library"
        )
        return Collectives()
    open_links(rank, names, mesh(rank, names, listener, endpoints, key, "links"))
    return Sockets()


def open_links(rank: int, names: Sequence[str], connections: dict[int, socket.socket]) -> None:
    """Hands connections, by rank, over to the library."""
    library = native.library()
    assert library is not None
    for connection in connections.values():
        connection.setblocking(False)
    num = len(names)
    sockets = [connections[n].detach() if n != rank else -1 for n in range(num)]
    encoded = [name.encode() for name in names]
    library.LinksOpen(rank, num, (ctypes.c_int * num)(*sockets), (ctypes.c_char_p * num)(*encoded))


def close() -> None:
    """Ends this process's links; steps that use them fail from here on."""
    library = native.library()
    if library is not None:
        library.LinksClose()
