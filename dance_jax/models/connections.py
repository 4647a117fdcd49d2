"""Authenticated connections between the servers of a launch.

Every server has one listener. A connection has a topic, which names its purpose, and an index,
which distinguishes several connections of two servers with the same topic. Both ends prove that
they know the secret of the launch, then exchange their `Identity`; a server with a different
identity is rejected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import json
import logging
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

log = logging.getLogger(__name__)

#: Seconds in which all servers must connect; also the seconds that a new connection waits for a
#: handler of its topic.
TIMEOUT_S = 60.0
#: Seconds a new connection has to authenticate.
_HANDSHAKE_S = 10
#: Version of the messages that connected servers exchange; increase it whenever a message of any
#: topic changes. The handshake must stay as it is, because it carries this version.
PROTOCOL = 2
#: Start of a connection: the caller's rank, the index, and the length in bytes of the topic, which
#: follows.
_CALL = struct.Struct("<IIB")
#: Length in bytes of the identity that follows.
_LENGTH = struct.Struct("<H")
_NONCE_BYTES = 32
_MAC_BYTES = hashlib.sha256().digest_size
_SEND_BYTES = 1 << 19
#: Linux's socket option for bytes per second; Python's socket module lacks the constant.
_SO_MAX_PACING_RATE = 47
#: Pacing rate as a multiple of the link's measured rate, which may be slightly too low.
_PACE = 1.1
#: With these options, a peer whose machine is gone is detected after 4 + 3 * 2 idle seconds.
_KEEPALIVE = (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))

#: Handler that takes over a connection: the caller's rank, the index, the socket.
Admit = Callable[[int, int, socket.socket], None]


@dataclasses.dataclass(frozen=True)
class Identity:
    """Properties that all servers of a launch must share."""

    #: Fingerprint of the model.
    model: str
    #: Format of routed experts (`ExpertFormat.name`).
    experts: str
    #: `EngineConfig.wire_dtype`.
    wire: str
    protocol: int = PROTOCOL


#: For each field of `Identity`: its name in messages, and what to do if servers differ in it. The
#: protocol is first, because servers with another protocol may have other fields.
_FIELDS = {
    "protocol": ("protocol", "install the same version of dance_jax on all servers"),
    "model": ("model", "copy the same files of the model to all servers"),
    "experts": ("format of experts", "convert the model with the same --experts for all servers"),
    "wire": ("wire type", "start all servers with the same --wire-dtype"),
}


class Key(NamedTuple):
    """Credentials with which a server proves that it belongs to the launch."""

    #: Secret of the launch.
    secret: bytes
    identity: Identity


class PeerListener:
    """Listens on a free port for connections from the other servers.

    Args:
        rank: rank of this server.
        names: names of all servers, by rank.
        address: IP address or host name at which other servers reach this one.
        key: connections from servers with another secret or identity are rejected.

    Raises:
        OSError: the server cannot listen on the address.
    """

    def __init__(self, rank: int, names: Sequence[str], address: str, key: Key) -> None:
        self._rank, self._names, self._key = rank, names, key
        self._admits: dict[str, Admit] = {}
        #: The latest connection for each rank, index and topic.
        self._latest: dict[tuple[int, int, str], object] = {}
        #: Guards `_admits` and `_latest`, and is notified when they change.
        self._changed = threading.Condition()
        self._closed = threading.Event()
        family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
        self._socket = socket.create_server((address, 0), family=family)
        host, port = self._socket.getsockname()[:2]
        #: "host:port", an IPv6 address in brackets.
        self.endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._thread = threading.Thread(target=self._accept, daemon=True, name="listener")
        self._thread.start()

    def on(self, topic: str, admit: Admit) -> None:
        """Admit connections of a topic from now on, including those that are waiting.

        Args:
            admit: called with each connection, in a separate thread. If a server restarts and
                connects again, `admit` is called again.
        """
        with self._changed:
            self._admits[topic] = admit
            self._changed.notify_all()

    def off(self, topic: str) -> None:
        """Stop admitting connections of a topic; they wait until `on` is called again."""
        with self._changed:
            del self._admits[topic]

    def close(self) -> None:
        """Stop listening; admitted connections stay open."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        # On Linux closing the socket does not wake `accept`; shutdown does. On macOS shutdown
        # fails, but is not needed.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _accept(self) -> None:
        """Accept connections; each has a thread for the handshake, so that none delays others."""
        while True:
            try:
                caller = self._socket.accept()
            except OSError as error:
                if self._closed.wait(0.1):
                    return
                log.warning("accepting a connection failed: %s", error)
                continue
            threading.Thread(target=self._admit, args=caller, daemon=True, name="admit").start()

    def _admit(self, connection: socket.socket, where: object) -> None:
        try:
            rank, index, topic = call = _recognise(connection, self._rank, self._key)
            if rank == self._rank or rank >= len(self._names):
                raise _Rejected(
                    f"invalid rank {rank}: this is server {self._rank} of {len(self._names)}"
                )
            admit = self._await_handler(topic, call)
            _tune(connection)
        except (OSError, _Rejected) as error:
            log.warning("connection from %s rejected: %s", where, error)
            connection.close()
            return
        admit(rank, index, connection)

    def _await_handler(self, topic: str, call: tuple[int, int, str]) -> Admit:
        """Wait for a handler of the topic; give up if the same caller connects again."""
        this = object()

        def superseded() -> bool:
            return self._latest[call] is not this

        with self._changed:
            self._latest[call] = this
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: topic in self._admits or superseded() or self._closed.is_set(), TIMEOUT_S
            )
            if superseded():
                raise _Rejected("a newer connection for the same purpose has replaced it")
            if topic not in self._admits:
                raise _Rejected(f"this server has no handler for topic {topic!r}")
            return self._admits[topic]


def dial(
    rank: int,
    peer: int,
    name: str,
    endpoint: str,
    key: Key,
    topic: str,
    index: int = 0,
    timeout_s: float = TIMEOUT_S,
) -> socket.socket:
    """Connect to another server's listener.

    There is only one attempt: a server listens before others learn its endpoint, so a refused
    connection means that the server is gone.

    Args:
        rank: rank of this server.
        peer, name, endpoint: rank, name and endpoint of the other server.
        key: key of the servers.
        topic: purpose of the connection, in a word.
        index: distinguishes several connections with the same topic.
        timeout_s: seconds until the attempt is given up.

    Raises:
        RuntimeError: the other server cannot be reached, or has another key or identity.
    """
    host, _, port = endpoint.rpartition(":")
    connection = None
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)
        _introduce(connection, rank, peer, index, topic, key)
        _tune(connection)
    except (OSError, _Rejected) as error:
        if connection is not None:
            connection.close()
        raise RuntimeError(f"cannot connect to server {name} at {endpoint}: {error}") from error
    return connection


def mesh(
    rank: int,
    names: Sequence[str],
    listener: PeerListener,
    endpoints: Sequence[str],
    key: Key,
    topic: str,
) -> dict[int, socket.socket]:
    """Connect all servers pairwise; every server must call this function.

    Args:
        rank: rank of this server.
        names, endpoints: names and endpoints of all servers, by rank.
        listener: listener of this server.
        key: key of the servers.
        topic: purpose of the connections.

    Returns:
        One connection to each other server, by rank.

    Raises:
        RuntimeError: a server cannot be reached, did not connect in time, or has another key or
            identity.
    """
    higher = range(rank + 1, len(names))
    deadline = time.monotonic() + TIMEOUT_S
    dialled: dict[int, socket.socket] = {}
    accepted: dict[int, socket.socket] = {}
    arrived = threading.Condition()

    def admit(peer: int, index: int, connection: socket.socket) -> None:
        with arrived:
            if peer in accepted:
                accepted[peer].close()
            accepted[peer] = connection
            arrived.notify()

    def left() -> float:
        return max(deadline - time.monotonic(), 0.01)

    listener.on(topic, admit)
    try:
        for peer in range(rank):
            dialled[peer] = dial(
                rank, peer, names[peer], endpoints[peer], key, topic, timeout_s=left()
            )
        with arrived:
            arrived.wait_for(lambda: accepted.keys() >= set(higher), left())
            if missing := [names[n] for n in higher if n not in accepted]:
                raise RuntimeError(f"no connection from {', '.join(missing)} in {TIMEOUT_S:g} s")
    except BaseException:
        for connection in (*dialled.values(), *accepted.values()):
            connection.close()
        raise
    finally:
        # A server that connects from here on has restarted; it waits for the next `mesh`.
        listener.off(topic)
    return dialled | accepted


def _tune(connection: socket.socket) -> None:
    """Set socket options: send small messages at once, and detect a peer that is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Room for the calls of a layer: the kernel sends them while the server computes.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
    for option, value in _KEEPALIVE:
        if hasattr(socket, option):  # macOS lacks some
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def pace(connection: socket.socket, *rates: float | None) -> None:
    """Limit a connection's send rate to that of its slowest link.

    Without pacing, a large message fills the queue in front of the link, and all small messages
    behind it wait. With pacing, the p99 gap of a stream next to another server's prompts was 13 ms
    instead of 16 ms (measured at 100 Mbps, hosts with one core each).

    Args:
        rates: rates of the links in bits per second; None if unknown.
    """
    known = [rate for rate in rates if rate is not None]
    if known and sys.platform == "linux":
        rate = struct.pack("@L", int(_PACE * min(known) / 8))
        connection.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate)


# Handshake: each end proves that it knows the secret, by an HMAC of the nonces of both ends, of
# their ranks and of the connection's purpose. Only then does either end send its identity.


class _Rejected(Exception):
    """The connection is rejected, for example because the other end is not of this launch."""


def _introduce(
    connection: socket.socket, rank: int, peer: int, index: int, topic: str, key: Key
) -> None:
    """Handshake at the dialling end: server `rank` calls server `peer`."""
    connection.settimeout(_HANDSHAKE_S)
    call = _CALL.pack(rank, index, len(topic.encode())) + topic.encode()
    mine = secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(call + mine)
    theirs = _receive(connection, _NONCE_BYTES)
    secret = key.secret
    _check(_receive(connection, _MAC_BYTES), _mac(secret, b"answer", call, peer, mine, theirs))
    connection.sendall(_mac(secret, b"call", call, peer, mine, theirs))
    _compare(connection, key.identity)


def _recognise(connection: socket.socket, rank: int, key: Key) -> tuple[int, int, str]:
    """Handshake at the accepting end; returns the caller's rank, the index and the topic."""
    connection.settimeout(_HANDSHAKE_S)
    call = _receive(connection, _CALL.size)
    caller, index, length = _CALL.unpack(call)
    call += (topic := _receive(connection, length))
    theirs, mine = _receive(connection, _NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
    secret = key.secret
    connection.sendall(mine + _mac(secret, b"answer", call, rank, theirs, mine))
    _check(_receive(connection, _MAC_BYTES), _mac(secret, b"call", call, rank, theirs, mine))
    _compare(connection, key.identity)
    return caller, index, topic.decode()


def _compare(connection: socket.socket, identity: Identity) -> None:
    """Exchange identities with the other end, which is authenticated, and compare them."""
    own = vars(identity)
    content = json.dumps(own).encode()
    connection.sendall(_LENGTH.pack(len(content)) + content)
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    try:
        theirs = dict(json.loads(_receive(connection, length)))
    except (ValueError, TypeError) as error:
        raise _Rejected("its identity message cannot be parsed") from error
    for field, (words, advice) in _FIELDS.items():
        if theirs.get(field) != own[field]:
            raise _Rejected(
                f"its {words} is {theirs.get(field)}, this server's {own[field]}: {advice}"
            )


def _mac(
    secret: bytes, role: bytes, call: bytes, called: int, caller_nonce: bytes, called_nonce: bytes
) -> bytes:
    text = role + call + struct.pack("<I", called) + caller_nonce + called_nonce
    return hmac.digest(secret, text, "sha256")


def _check(found: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(found, expected):
        raise _Rejected("it has another key, so it belongs to another launch")


def _receive(connection: socket.socket, count: int) -> bytes:
    parts = b""
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            raise _Rejected("the other end closed the connection")
        parts += part
    return parts
