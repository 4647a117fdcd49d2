"""Rows between servers on CPU, over TCP connections of our own: links_cpu.cc.

XLA's collectives on CPU send equal parts, one after the other, with a handshake each. Here every
server's gateway has a connection to every other's, and a call sends to all and receives from all at
once what goes and nothing else: a layer is two rounds, and one where nothing goes.

The connections are made in Python and belong to the process; a compiled step knows nothing of them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import hmac
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# The key-value store of jax.distributed can be reached nowhere else.
from jax._src import distributed  # pyright: ignore[reportPrivateImportUsage]

from dance_jax.models import kernels_cpu
from dance_jax.models.collectives import Collectives
from dance_jax.models.messages import (
    Columns,
    Exchanged,
    Incoming,
    Outgoing,
    Transport,
    row_bytes,
)
from dance_jax.models.topology import Topology, local_index

log = logging.getLogger(__name__)

#: Bytes before the rows of a message.
HEAD_BYTES = 16
#: Seconds all servers have to connect.
TIMEOUT_S = 60
#: Seconds a stranger has to prove that it is none.
_HANDSHAKE_S = 10
_NONCE_BYTES = 32
_MAC_BYTES = hashlib.sha256().digest_size
#: An idle peer whose machine is gone shows after 4 + 3 * 2 seconds.
_KEEPALIVE = (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))


@dataclasses.dataclass(frozen=True)
class Sockets:
    """The `Transport` over this process's open connections."""

    name = "sockets"

    def memory(self, layers: int) -> tuple[()]:
        return ()

    def dispatch(
        self, topology: Topology, outgoing: Outgoing, active: Array, memory: tuple[()]
    ) -> tuple[Incoming, Exchanged]:
        num, room = topology.num_servers, topology.room
        like = (outgoing.expert[0], outgoing.weight, *outgoing.hidden)
        results = [
            jax.ShapeDtypeStruct((num, num + 1), jnp.int32),
            *(jax.ShapeDtypeStruct((room, column.shape[1]), column.dtype) for column in like),
        ]
        operands = (active, outgoing.goes, outgoing.expert, outgoing.weight, *outgoing.hidden)
        heads, expert, weight, *hidden = _call("LinksDispatch", topology, results, *operands)
        rows = heads[:, :num]
        sent = payload_bytes(rows, row_bytes(like), row_bytes(outgoing.hidden))[topology.rank]
        exchanged = Exchanged(rows, sent, heads[:, num].any(), memory)
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
    handler = jax.ffi.ffi_call(kernels_cpu.target(symbol), results, has_side_effect=True)
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
class Phase:
    """Time the gateway spent in the calls of one phase since the links were opened."""

    calls: int
    #: Seconds until the first bytes of the last peer came: what this server waited for others.
    waited_s: float
    #: Seconds from then on.
    moved_s: float


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
    timing, traffic = np.zeros((2, 3), np.int64), np.zeros((servers, 2), np.int64)
    library = kernels_cpu.library()
    if library is not None:
        pointer = ctypes.POINTER(ctypes.c_int64)
        library.LinksCounters(
            servers, timing.ctypes.data_as(pointer), traffic.ctypes.data_as(pointer)
        )
    dispatch, give_back = (
        Phase(calls, waited / 1e9, moved / 1e9) for calls, waited, moved in timing.tolist()
    )
    sent, received = traffic.T.tolist()
    return Counters(dispatch, give_back, tuple(sent), tuple(received))


# Connections.


def connect(rank: int, names: Sequence[str], address: str, key: bytes, port: int = 0) -> Transport:
    """Connects this server with all others of the jax.distributed job it has joined.

    All servers call it, and get the same kind of transport: connections where every server can
    use them, else collectives.

    Args:
        rank: this server's.
        names: all servers', by rank, for messages.
        address: IP address or host name to listen on, by which the others reach this server.
        key: a secret of this launch; who does not know it is not let in.
        port: to listen on; 0: any.

    Raises:
        RuntimeError: a server did not connect, or has another key.
        OSError: the address cannot be listened on.
    """
    if len(names) == 1:
        return Collectives()
    if not kernels_cpu.usable():
        _publish(rank, "", names)
        log.warning("servers exchange rows by collectives, slower: no C++ library, or no CPU")
        return Collectives()
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server((address, port), family=family) as listener:
        host, port = listener.getsockname()[:2]
        addresses = _publish(rank, f"{host}:{port}", names)
        if missing := [name for name, each in zip(names, addresses, strict=True) if not each]:
            log.warning("servers exchange rows by collectives: %s has no links", missing[0])
            return Collectives()
        open_links(rank, names, join(rank, names, listener, addresses, key))
    return Sockets()


def _publish(rank: int, address: str, names: Sequence[str]) -> list[str]:
    """Every server's address, by rank."""
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("links are made after jax.distributed.initialize")
    client.key_value_set(f"dance_jax/links/{rank}", address or "-")
    found = (
        client.blocking_key_value_get(f"dance_jax/links/{n}", TIMEOUT_S * 1000)
        for n in range(len(names))
    )
    return ["" if each == "-" else each for each in found]


def open_links(rank: int, names: Sequence[str], connections: dict[int, socket.socket]) -> None:
    """Hands connections, by rank, over to the library."""
    library = kernels_cpu.library()
    assert library is not None
    for connection in connections.values():
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            if hasattr(socket, option):  # macOS lacks some
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    num = len(names)
    sockets = [connections[n].detach() if n != rank else -1 for n in range(num)]
    encoded = [name.encode() for name in names]
    library.LinksOpen(rank, num, (ctypes.c_int * num)(*sockets), (ctypes.c_char_p * num)(*encoded))


def close() -> None:
    """Ends this process's links; steps that use them fail from here on."""
    library = kernels_cpu.library()
    if library is not None:
        library.LinksClose()


def join(
    rank: int,
    names: Sequence[str],
    listener: socket.socket,
    addresses: Sequence[str],
    key: bytes,
) -> dict[int, socket.socket]:
    """Connections to all other servers, by rank: dialled to lower ranks, accepted from higher.

    Args:
        listener: what the others dial; not closed here.
        addresses: "host:port" of every server.

    Raises:
        RuntimeError: a server cannot be reached, did not come in time, or has another key.
    """
    deadline = time.monotonic() + TIMEOUT_S
    connections = {}
    try:
        for peer in range(rank):
            connections[peer] = _dial(rank, peer, names[peer], addresses[peer], key, deadline)
        _accept(rank, names, listener, key, deadline, connections)
    except BaseException:
        for connection in connections.values():
            connection.close()
        raise
    return connections


def _dial(
    rank: int, peer: int, name: str, address: str, key: bytes, deadline: float
) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = None
    try:
        left = max(deadline - time.monotonic(), 0.01)
        connection = socket.create_connection((host, int(port)), timeout=left)
        _introduce(connection, rank, peer, key)
    except (OSError, _Stranger) as error:
        if connection is not None:
            connection.close()
        raise RuntimeError(f"server {name} at {address}: {error}") from error
    return connection


def _accept(
    rank: int,
    names: Sequence[str],
    listener: socket.socket,
    key: bytes,
    deadline: float,
    connections: dict[int, socket.socket],
) -> None:
    """Waits for all higher ranks; each caller has a thread, so that none holds up the others."""
    lock = threading.Lock()

    def admit(connection: socket.socket, where: object) -> None:
        try:
            peer = _recognise(connection, rank, key)
            with lock:
                if not rank < peer < len(names) or peer in connections:
                    raise _Stranger(f"calls itself server {peer}")
                connections[peer] = connection
        except (OSError, _Stranger) as error:
            log.warning("a stranger at %s was not let in: %s", where, error)
            connection.close()

    listener.settimeout(0.1)
    while len(connections) < len(names) - 1:
        if time.monotonic() > deadline:
            missing = [name for n, name in enumerate(names) if n > rank and n not in connections]
            raise RuntimeError(f"no connection from {', '.join(missing)} in {TIMEOUT_S} s")
        try:
            caller = listener.accept()
        except TimeoutError:
            continue
        threading.Thread(target=admit, args=caller, daemon=True, name="links-admit").start()


# Both prove that they know the key, by an HMAC of random numbers of both and of who they are.


class _Stranger(Exception):
    """The other end is not a server of this launch."""


def _introduce(connection: socket.socket, rank: int, peer: int, key: bytes) -> None:
    """The dialling end: server `rank` calls server `peer`."""
    connection.settimeout(_HANDSHAKE_S)
    mine = secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(struct.pack("<I", rank) + mine)
    theirs = _receive(connection, _NONCE_BYTES)
    _check(_receive(connection, _MAC_BYTES), _mac(key, b"answer", rank, peer, mine, theirs))
    connection.sendall(_mac(key, b"call", rank, peer, mine, theirs))


def _recognise(connection: socket.socket, rank: int, key: bytes) -> int:
    """The accepting end: the rank of the server that calls."""
    connection.settimeout(_HANDSHAKE_S)
    (caller,) = struct.unpack("<I", _receive(connection, 4))
    theirs, mine = _receive(connection, _NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(mine + _mac(key, b"answer", caller, rank, theirs, mine))
    _check(_receive(connection, _MAC_BYTES), _mac(key, b"call", caller, rank, theirs, mine))
    return caller


def _mac(
    key: bytes, role: bytes, caller: int, called: int, caller_nonce: bytes, called_nonce: bytes
) -> bytes:
    text = role + struct.pack("<II", caller, called) + caller_nonce + called_nonce
    return hmac.digest(key, text, "sha256")


def _check(found: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(found, expected):
        raise _Stranger("it has another key")


def _receive(connection: socket.socket, count: int) -> bytes:
    parts = b""
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            raise _Stranger("it ended the connection")
        parts += part
    return parts
