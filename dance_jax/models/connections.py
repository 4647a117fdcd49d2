"""Authenticated connections between the servers of a launch.

Every server listens on one port. A connection has a topic, which names its purpose, and an index,
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

from dance_jax.logs import OnceASecond

log = logging.getLogger(__name__)
#: For failures of accept(2), which fails again at once when this process has no descriptor left.
_accept_log = logging.getLogger(f"{__name__}.accept")
_accept_log.addFilter(OnceASecond())

#: Seconds in which all servers must connect.
TIMEOUT_S = 60.0
#: Seconds a new connection has for each message of its handshake.
_HANDSHAKE_S = 10
#: Maximum number of connections that authenticate at once; further ones wait to be accepted. Each
#: takes a thread and a descriptor, and strangers can make any number of them.
_HANDSHAKES = 128
#: Version of the messages that connected servers exchange; increase it whenever a message of any
#: topic changes. The handshake must stay as it is, because it carries this version.
PEER_PROTOCOL = 2
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

#: Takes over a connection; called with the other server's rank, the index and the socket.
Handler = Callable[[int, int, socket.socket], None]


@dataclasses.dataclass(frozen=True)
class Identity:
    """Properties that all servers of a launch must share."""

    #: Fingerprint of the model.
    model: str
    #: Format of routed experts (`ExpertFormat.name`).
    experts: str
    #: `EngineConfig.wire_dtype`.
    wire: str
    protocol: int = PEER_PROTOCOL


#: For each field of `Identity`: its name in messages, and what to do if servers differ in it. The
#: protocol is first, because servers with another protocol may have other fields.
_FIELDS = {
    "protocol": ("protocol", "install the same version of dance_jax on all servers"),
    "model": ("model", "copy the same files of the model to all servers"),
    "experts": ("format of experts", "convert the model with the same --experts for all servers"),
    "wire": ("wire type", "start all servers with the same --wire-dtype"),
}


class Credentials(NamedTuple):
    """With these a server proves that it belongs to the launch."""

    #: Secret of the launch.
    secret: bytes
    identity: Identity


class Connections:
    """One server's connections with the others: it accepts connections from them and dials them.

    All topics of a server share this object, its one port and its endpoints. A connection whose
    topic has no handler yet is kept until there is one.

    Args:
        rank: rank of this server.
        names: names of all servers, by rank.
        address: IP address or host name at which other servers reach this one.
        credentials: connections from servers with another secret or identity are rejected.

    Raises:
        OSError: the server cannot listen on the address.
    """

    def __init__(
        self, rank: int, names: Sequence[str], address: str, credentials: Credentials
    ) -> None:
        self.rank, self._credentials = rank, credentials
        #: Names of all servers, by rank; they change as servers join and leave.
        self.names = [*names]
        #: Rates of the servers' links by rank, in bits per second; None: not known. They change so.
        self.rates: list[float | None] = [None] * len(names)
        #: By rank, where the servers listen; "": the server is restarting. Set before dialling.
        self.endpoints = [""] * len(names)
        #: The topic handlers.
        self._handlers: dict[str, Handler] = {}
        #: Connections that are not claimed yet, by the caller's rank, index and topic.
        self._waiting: dict[tuple[int, int, str], socket.socket] = {}
        #: Per topic of `dial_all`, the number of connections to each server, and their handler.
        self._dialled: dict[str, tuple[int, Handler]] = {}
        #: Guards `_handlers` and `_waiting`, and is notified when a connection waits.
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._handshakes = threading.BoundedSemaphore(_HANDSHAKES)
        family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
        self._socket = socket.create_server((address, 0), family=family)
        host, port = self._socket.getsockname()[:2]
        #: "host:port" of this server, an IPv6 address in brackets.
        self.endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._thread = threading.Thread(target=self._accept, daemon=True, name="listener")
        self._thread.start()

    def handle(self, topic: str, handler: Handler) -> None:
        """Handle connections of a topic from now on, including those that are waiting.

        Args:
            topic: purpose of the connections.
            handler: called with each connection, in a separate thread; also when a server restarts
                and connects again.
        """
        with self._changed:
            self._handlers[topic] = handler
            calls = [call for call in self._waiting if call[2] == topic]
            waiting = [(*call[:2], self._waiting.pop(call)) for call in calls]
        for each in waiting:
            threading.Thread(target=handler, args=each, daemon=True, name="handler").start()

    def dial(
        self, peer: int, topic: str, index: int = 0, timeout_s: float = TIMEOUT_S
    ) -> socket.socket:
        """Connect to another server.

        There is only one attempt: a server listens before others learn its endpoint, so a refused
        connection means that the server is gone.

        Args:
            peer: rank of the other server.
            topic: purpose of the connection, in a word.
            index: distinguishes several connections with the same topic.
            timeout_s: seconds until the attempt is given up.

        Raises:
            RuntimeError: the other server cannot be reached, or has another secret or identity.
        """
        endpoint, connection = self.endpoints[peer], None
        host, _, port = endpoint.rpartition(":")
        try:
            if not endpoint:
                raise _Rejected("it is not running")
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)
            _introduce(connection, self.rank, peer, index, topic, self._credentials)
            _tune(connection)
        except (OSError, _Rejected) as error:
            if connection is not None:
                connection.close()
            name = self.names[peer]
            raise RuntimeError(f"cannot connect to server {name} at {endpoint}: {error}") from error
        return connection

    def dial_all(self, topic: str, count: int, handler: Handler) -> None:
        """Connect to every server that is up, and again to each one after it restarts.

        Args:
            topic: purpose of the connections.
            count: connections to each server, with the indices 0 to count - 1.
            handler: called with each connection, which replaces the previous one of the server and
                index.

        Raises:
            RuntimeError: a server cannot be reached, or has another secret or identity.
        """
        self._dialled[topic] = count, handler
        for peer, endpoint in enumerate(self.endpoints):
            if peer != self.rank and endpoint:
                self._dial_topic(topic, peer)

    def _dial_topic(self, topic: str, peer: int) -> None:
        count, handler = self._dialled[topic]
        for index in range(count):
            handler(peer, index, self.dial(peer, topic, index))

    def lost(self, peer: int) -> None:
        """Record that a server is gone until it restarts; dialling it fails at once."""
        self.endpoints[peer] = ""

    def restarted(self, peer: int, endpoint: str) -> None:
        """Record a restarted server's endpoint, and repeat the connections of `dial_all` to it in a
        thread.

        A server that was only cut off has the same endpoint as before, but no connections.
        """
        self.endpoints[peer] = endpoint

        def redial() -> None:
            try:
                for topic in self._dialled:
                    self._dial_topic(topic, peer)
            except RuntimeError as error:  # the server died again, and the launcher will report it
                log.warning("%s", error)

        threading.Thread(target=redial, daemon=True, name="redial").start()

    def mesh(self, topic: str) -> dict[int, socket.socket]:
        """Connect all servers pairwise; every server must call this function.

        Returns:
            One connection to each other server, by rank.

        Raises:
            RuntimeError: a server cannot be reached, did not connect in time, or has another
                secret or identity.
        """
        higher = range(self.rank + 1, len(self.names))
        deadline = time.monotonic() + TIMEOUT_S
        found: dict[int, socket.socket] = {}

        def left() -> float:
            return max(deadline - time.monotonic(), 0.01)

        def missing() -> list[str]:
            return [self.names[n] for n in higher if (n, 0, topic) not in self._waiting]

        try:
            for peer in range(self.rank):
                found[peer] = self.dial(peer, topic, timeout_s=left())
            with self._changed:
                self._changed.wait_for(lambda: not missing(), left())
                absent = missing()
                arrived = [n for n in higher if (n, 0, topic) in self._waiting]
                found |= {peer: self._waiting.pop((peer, 0, topic)) for peer in arrived}
            if absent:
                raise RuntimeError(f"no connection from {', '.join(absent)} in {TIMEOUT_S:g} s")
        except BaseException:
            for connection in found.values():
                connection.close()
            raise
        return found

    def close(self) -> None:
        """Stop listening; claimed and dialled connections stay open, waiting ones are closed."""
        self._closed.set()
        # On Linux closing the socket does not wake `accept`; shutdown does. On macOS shutdown
        # fails, but is not needed.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        with self._changed:
            for connection in self._waiting.values():
                connection.close()
            self._waiting.clear()

    def _accept(self) -> None:
        """Accept connections; each has a thread for the handshake, so that none delays others."""
        while self._handshake_slot():
            try:
                connection, where = self._socket.accept()
                self._start_handshake(connection, where)
            except (OSError, RuntimeError) as error:  # no descriptor, or no thread
                self._handshakes.release()
                if self._closed.wait(0.1):
                    return
                _accept_log.warning("accepting a connection failed: %s", error)

    def _handshake_slot(self) -> bool:
        """Wait until one more connection may authenticate; False if this object is closed."""
        while not self._handshakes.acquire(timeout=0.1):
            if self._closed.is_set():
                return False
        return True

    def _start_handshake(self, connection: socket.socket, where: object) -> None:
        thread = threading.Thread(
            target=self._admit, args=(connection, where), daemon=True, name="admit"
        )
        try:
            thread.start()
        except RuntimeError:
            connection.close()
            raise

    def _admit(self, connection: socket.socket, where: object) -> None:
        try:
            rank, index, topic = call = _recognise(connection, self.rank, self._credentials)
            if rank == self.rank or rank >= len(self.names):
                raise _Rejected(
                    f"invalid rank {rank}: this is server {self.rank} of {len(self.names)}"
                )
            _tune(connection)
        except (OSError, _Rejected) as error:
            log.warning("connection from %s rejected: %s", where, error)
            connection.close()
            return
        finally:
            self._handshakes.release()
        with self._changed:
            handler = self._handlers.get(topic)
            if handler is None:
                self._wait(call, connection)
        if handler is not None:
            handler(rank, index, connection)

    def _wait(self, call: tuple[int, int, str], connection: socket.socket) -> None:
        """Keep a connection until it is claimed; it replaces an older one of the same caller."""
        if self._closed.is_set():
            connection.close()
            return
        if call in self._waiting:
            self._waiting[call].close()
        self._waiting[call] = connection
        self._changed.notify_all()


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
    connection: socket.socket,
    rank: int,
    peer: int,
    index: int,
    topic: str,
    credentials: Credentials,
) -> None:
    """Handshake at the dialling end: server `rank` calls server `peer`."""
    connection.settimeout(_HANDSHAKE_S)
    call = _CALL.pack(rank, index, len(topic.encode())) + topic.encode()
    mine = secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(call + mine)
    theirs = _receive(connection, _NONCE_BYTES)
    secret = credentials.secret
    _check(_receive(connection, _MAC_BYTES), _mac(secret, b"answer", call, peer, mine, theirs))
    connection.sendall(_mac(secret, b"call", call, peer, mine, theirs))
    _compare(connection, credentials.identity)


def _recognise(
    connection: socket.socket, rank: int, credentials: Credentials
) -> tuple[int, int, str]:
    """Handshake at the accepting end; returns the caller's rank, the index and the topic."""
    connection.settimeout(_HANDSHAKE_S)
    call = _receive(connection, _CALL.size)
    caller, index, length = _CALL.unpack(call)
    call += (topic := _receive(connection, length))
    theirs, mine = _receive(connection, _NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
    secret = credentials.secret
    connection.sendall(mine + _mac(secret, b"answer", call, rank, theirs, mine))
    _check(_receive(connection, _MAC_BYTES), _mac(secret, b"call", call, rank, theirs, mine))
    _compare(connection, credentials.identity)
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
                f"its {words} is {theirs.get(field)}, but this server's is {own[field]}: {advice}"
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
    """Receive a message of the handshake, within the connection's timeout as a whole."""
    timeout_s = connection.gettimeout()
    assert timeout_s is not None
    deadline = time.monotonic() + timeout_s
    parts = b""
    while len(parts) < count:
        connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        part = connection.recv(count - len(parts))
        if not part:
            raise _Rejected("the other end closed the connection")
        parts += part
    connection.settimeout(timeout_s)
    return parts
