"""Connections between all servers of a launch, which only those with its key can make."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence

# The key-value store of jax.distributed can be reached nowhere else.
from jax._src import distributed  # pyright: ignore[reportPrivateImportUsage]

log = logging.getLogger(__name__)

#: Seconds all servers have to connect.
TIMEOUT_S = 60
#: Seconds a stranger has to prove that it is none.
_HANDSHAKE_S = 10
_NONCE_BYTES = 32
_MAC_BYTES = hashlib.sha256().digest_size
#: An idle peer whose machine is gone shows after 4 + 3 * 2 seconds.
_KEEPALIVE = (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))


def publish(topic: str, rank: int, address: str, names: Sequence[str]) -> list[str]:
    """Every server's address, by rank, for one purpose; all servers call it.

    Args:
        topic: the purpose.
        rank: this server's.
        address: where it listens; "": it does not.
        names: all servers'.

    Raises:
        RuntimeError: this process has not joined the jax.distributed job.
    """
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("connections are made after jax.distributed.initialize")
    client.key_value_set(f"dance_jax/{topic}/{rank}", address or "-")
    found = (
        client.blocking_key_value_get(f"dance_jax/{topic}/{n}", TIMEOUT_S * 1000)
        for n in range(len(names))
    )
    return ["" if each == "-" else each for each in found]


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
        for connection in connections.values():
            _tune(connection)
    except BaseException:
        for connection in connections.values():
            connection.close()
        raise
    return connections


def _tune(connection: socket.socket) -> None:
    """Small messages go at once, and a peer that is gone is noticed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        if hasattr(socket, option):  # macOS lacks some
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


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
