"""Connections between all servers of a launch, which only those with its key can make.

Every server has one listener. A connection to it has a topic, what it is for, and an index, where
two servers have several for one topic. Who has proved that it knows the key says what it is a
server of (`Identity`), and is refused where that is something else.
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

#: Seconds all servers have to connect, and a connection waits for somebody to want its topic.
TIMEOUT_S = 60.0
#: Seconds a new connection has to authenticate.
_HANDSHAKE_S = 10
#: Number of what servers say to each other once they are connected. It grows whenever a message of
#: any topic becomes another one; how a connection begins must stay for it to be understood.
PROTOCOL = 2
#: How a connection begins: the caller's rank, the index, and the bytes of the topic that follows.
_CALL = struct.Struct("<IIB")
#: Before an identity: its bytes.
_LENGTH = struct.Struct("<H")
_NONCE_BYTES = 32
_MAC_BYTES = hashlib.sha256().digest_size
_SEND_BYTES = 1 << 19
#: Linux's socket option for bytes per second, which Python's socket module does not name.
_SO_MAX_PACING_RATE = 47
#: Of a link's rate: what was measured may be a little less than it is.
_PACE = 1.1
#: An idle peer whose machine is gone shows after 4 + 3 * 2 seconds.
_KEEPALIVE = (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))

#: Takes over a connection: the caller's rank, the index, the socket.
Admit = Callable[[int, int, socket.socket], None]


@dataclasses.dataclass(frozen=True)
class Identity:
    """What servers that call each other have in common."""

    #: The model's fingerprint.
    model: str
    #: Format of routed experts (`ExpertFormat.name`).
    experts: str
    #: `EngineConfig.wire_dtype`.
    wire: str
    protocol: int = PROTOCOL


#: Fields of `Identity` in words, and what to do about servers that differ in one. Those of another
#: protocol may have other fields: it comes first.
_FIELDS = {
    "protocol": ("protocol", "install the same version of dance_jax on all servers"),
    "model": ("model", "copy the same files of the model to all servers"),
    "experts": ("format of experts", "convert the model with the same --experts for all servers"),
    "wire": ("wire type", "start all servers with the same --wire-dtype"),
}


class Key(NamedTuple):
    """What a server shows others that it is one of them by."""

    #: Of the launch.
    secret: bytes
    identity: Identity


class PeerListener:
    """Where the other servers reach this one, on a free port.

    Args:
        rank: this server's.
        names: of all servers, by rank.
        address: IP address or host name of this server, where the others reach it.
        key: whose secret somebody does not know is not let in, nor who is of another identity.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(self, rank: int, names: Sequence[str], address: str, key: Key) -> None:
        self._rank, self._names, self._key = rank, names, key
        self._admits: dict[str, Admit] = {}
        #: The last call of each rank, topic and index.
        self._latest: dict[tuple[int, int, str], object] = {}
        #: Guards both; told of changes of them.
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
        """Lets connections of a topic in from now on, those that wait for it too.

        Args:
            admit: called with each, in a thread of its own. Connections that a server makes anew,
                after a restart, are given to it like the first.
        """
        with self._changed:
            self._admits[topic] = admit
            self._changed.notify_all()

    def off(self, topic: str) -> None:
        """Makes connections of a topic wait for the next `on`."""
        with self._changed:
            del self._admits[topic]

    def close(self) -> None:
        """Ends the listening; connections that were let in live on."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        # On Linux `accept` waits on when its socket is closed; on macOS this fails, without need.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _accept(self) -> None:
        """Each caller has a thread, so that none holds up the others."""
        while True:
            try:
                caller = self._socket.accept()
            except OSError as error:
                if self._closed.wait(0.1):
                    return
                log.warning("a connection could not be accepted: %s", error)
                continue
            threading.Thread(target=self._admit, args=caller, daemon=True, name="admit").start()

    def _admit(self, connection: socket.socket, where: object) -> None:
        try:
            rank, index, topic = call = _recognise(connection, self._rank, self._key)
            if rank == self._rank or rank >= len(self._names):
                raise _Stranger(f"calls itself server {rank}")
            admit = self._wanted(topic, call)
            _tune(connection)
        except (OSError, _Stranger) as error:
            log.warning("a caller at %s was not let in: %s", where, error)
            connection.close()
            return
        admit(rank, index, connection)

    def _wanted(self, topic: str, call: tuple[int, int, str]) -> Admit:
        """Waits until somebody wants the topic; a call that is made once more ends the first."""
        this = object()

        def repeated() -> bool:
            return self._latest[call] is not this

        with self._changed:
            self._latest[call] = this
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: topic in self._admits or repeated() or self._closed.is_set(), TIMEOUT_S
            )
            if repeated():
                raise _Stranger("it called once more")
            if topic not in self._admits:
                raise _Stranger(f"nobody wants a connection for {topic!r}")
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
    """A connection to another server's listener.

    It listens before its endpoint is known, so where nobody listens it is gone: no second try.

    Args:
        rank: this server's.
        peer, name, endpoint: the other server's.
        key: of the servers.
        topic: what for, in a word.
        index: tells several connections for one topic apart.
        timeout_s: seconds until the connection is given up.

    Raises:
        RuntimeError: the other server cannot be reached, or has another key or identity.
    """
    host, _, port = endpoint.rpartition(":")
    connection = None
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)
        _introduce(connection, rank, peer, index, topic, key)
        _tune(connection)
    except (OSError, _Stranger) as error:
        if connection is not None:
            connection.close()
        raise RuntimeError(f"server {name} at {endpoint}: {error}") from error
    return connection


def mesh(
    rank: int,
    names: Sequence[str],
    listener: PeerListener,
    endpoints: Sequence[str],
    key: Key,
    topic: str,
) -> dict[int, socket.socket]:
    """One connection with each other server, by rank; all servers call it.

    Args:
        rank: this server's.
        names, endpoints: of all servers, by rank.
        listener: this server's.
        key: of the servers.
        topic: what for.

    Raises:
        RuntimeError: a server cannot be reached, did not come in time, or has another key or
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
        # Who calls from here on was restarted, and waits until it is met anew.
        listener.off(topic)
    return dialled | accepted


def _tune(connection: socket.socket) -> None:
    """Small messages go at once, and a peer that is gone is noticed."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Room for the calls of a layer, which the kernel sends while the server computes.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
    for option, value in _KEEPALIVE:
        if hasattr(socket, option):  # macOS lacks some
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def pace(connection: socket.socket, *rates: float | None) -> None:
    """Sends no faster than the slowest of these links, in bits per second; None: it is unknown.

    Else a large message fills the queue in front of the link at once, and every small one behind
    it waits until it is through. (measured) Beside another server's prompts at 100 Mbps, hosts of
    a core each, the p99 gap of a stream was 13 ms instead of 16.
    """
    known = [rate for rate in rates if rate is not None]
    if known and sys.platform == "linux":
        rate = struct.pack("@L", int(_PACE * min(known) / 8))
        connection.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate)


# Both prove that they know the secret, by an HMAC of random numbers of both, of who they are, and
# of what the connection is for. Only then either tells the other its identity.


class _Stranger(Exception):
    """The other end is not a server of this launch."""


def _introduce(
    connection: socket.socket, rank: int, peer: int, index: int, topic: str, key: Key
) -> None:
    """The dialling end: server `rank` calls server `peer`."""
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
    """The accepting end: the rank of the server that calls, index and topic."""
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
    """Tells the other end, which has proved itself, this server's identity, and checks its own."""
    own = vars(identity)
    content = json.dumps(own).encode()
    connection.sendall(_LENGTH.pack(len(content)) + content)
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    try:
        theirs = dict(json.loads(_receive(connection, length)))
    except (ValueError, TypeError) as error:
        raise _Stranger("what it says of itself cannot be read") from error
    for field, (words, advice) in _FIELDS.items():
        if theirs.get(field) != own[field]:
            raise _Stranger(
                f"its {words} is {theirs.get(field)}, this server's {own[field]}: {advice}"
            )


def _mac(
    secret: bytes, role: bytes, call: bytes, called: int, caller_nonce: bytes, called_nonce: bytes
) -> bytes:
    text = role + call + struct.pack("<I", called) + caller_nonce + called_nonce
    return hmac.digest(secret, text, "sha256")


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
