"""Measure the network between two servers: round trips, and the rate in each direction.

A link may be shaped by a token bucket: the saved-up burst passes at once and says nothing about
the rate, and deep buffers let a sender believe that all data has arrived. So rates are measured
where the data arrives, and the beginning is not counted.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import select
import socket
import statistics
import struct
import threading
import time

from dance_jax.launch.preflight.at_once import at_once
from dance_jax.launch.preflight.messages import Link, Peer

#: Seconds until a peer that does not answer counts as unreachable; a lost packet is sent again
#: after one second.
CONNECT_TIMEOUT_S = 4.0
#: Seconds without any data after which a measurement fails.
STALL_TIMEOUT_S = 3.0
#: Round trips of which the median is taken.
PINGS = 9
#: Fraction of the time at the beginning that is not counted.
SETTLING = 0.3
#: A rate is measured for at least this many round trips (TCP needs some to find the rate), and for
#: at most this many seconds.
RATE_ROUND_TRIPS, RATE_LONGEST_S = 15, 3.0

#: Seconds a connected peer may wait with its next command while it measures other peers.
_COMMAND_TIMEOUT_S = 60.0

TOKEN_CHARACTERS = 64
_BLOCK = 1 << 18
_PING, _SEND, _RECEIVE = b"p", b"s", b"r"
_NUMBER = struct.Struct("!d")
#: Makes close() drop unsent data, which would keep a slow link busy for long.
_DROP = struct.pack("ii", 1, 0)


def listen(address: str, token: str, seconds: float) -> int:
    """Serve peers that know the token, in threads of this process.

    Args:
        address: of this machine, to listen at.
        token: TOKEN_CHARACTERS of ASCII; peers with another token are disconnected.
        seconds: until listening ends.

    Returns:
        The TCP port.

    Raises:
        OSError: the address is not an address of this machine.
    """
    listener = bound(address, 0)
    deadline = time.monotonic() + seconds
    arguments = (listener, token.encode(), deadline)
    threading.Thread(target=_accept, args=arguments, daemon=True, name="measured").start()
    return listener.getsockname()[1]


def bound(address: str, port: int) -> socket.socket:
    """Open a TCP socket that listens at an address of this machine.

    Raises:
        OSError: no socket can be bound to the address.
    """
    failure: OSError | None = None
    for family, kind, protocol, _, where in socket.getaddrinfo(
        address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(64)
            return listener
        except OSError as error:
            listener.close()
            failure = failure or error
    raise failure or OSError("the name has no address")


def _accept(listener: socket.socket, token: bytes, deadline: float) -> None:
    with listener:
        while (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_serve, args=(peer, token), daemon=True).start()


def _serve(peer: socket.socket, token: bytes) -> None:
    """Execute the commands of a peer with the token until it closes the connection."""
    with contextlib.suppress(OSError, EOFError), peer:
        _prepare(peer)
        if not hmac.compare_digest(_exactly(peer, TOKEN_CHARACTERS), token):
            return
        peer.settimeout(_COMMAND_TIMEOUT_S)
        while command := peer.recv(1):
            if command == _PING:
                peer.sendall(_PING)
                continue
            peer.settimeout(STALL_TIMEOUT_S)
            seconds = min(*_NUMBER.unpack(_exactly(peer, _NUMBER.size)), RATE_LONGEST_S)
            if command == _SEND:
                peer.sendall(_NUMBER.pack(_arriving_rate(peer, seconds)))
                _drain(peer)
            else:
                _push(peer, seconds + STALL_TIMEOUT_S)
            return


def measure(peers: list[Peer], token: str, seconds: float) -> list[Link]:
    """Measure the link to each peer.

    All connections are opened at the same time, because unreachable peers take long; then the
    peers are measured one after the other.

    Args:
        peers: addresses at which the peers listen.
        token: the token that the peers' `listen` got.
        seconds: of measuring the rate in each direction; 0: round trips only.
    """
    calls = [functools.partial(_connect, peer, token) for peer in peers]
    connected = at_once(calls, CONNECT_TIMEOUT_S + STALL_TIMEOUT_S)
    links = []
    for peer, connection in zip(peers, connected, strict=True):
        try:
            if isinstance(connection, Exception):
                raise connection
            with connection:
                links.append(_measure(peer, connection, token, seconds))
        except (OSError, EOFError) as error:
            links.append(Link(reason(error)))
    return links


def reason(error: Exception) -> str:
    """A socket error as text."""
    if isinstance(error, TimeoutError):
        return "timed out"
    return (getattr(error, "strerror", None) or str(error)).lower()


def _measure(peer: Peer, connection: socket.socket, token: str, seconds: float) -> Link:
    rtt = statistics.median(_ping(connection) for _ in range(PINGS))
    if not seconds:
        return Link(rtt=rtt)
    seconds = min(max(seconds, RATE_ROUND_TRIPS * rtt), RATE_LONGEST_S)
    connection.sendall(_SEND + _NUMBER.pack(seconds))
    sent = _push(connection, seconds + STALL_TIMEOUT_S)
    connection.close()
    with _connect(peer, token) as second:
        second.sendall(_RECEIVE + _NUMBER.pack(seconds))
        return Link(rtt=rtt, sent=sent, received=_arriving_rate(second, seconds))


def _connect(peer: Peer, token: str) -> socket.socket:
    """Connect to a peer and check that it answers."""
    connection = socket.create_connection((peer.address, peer.port), CONNECT_TIMEOUT_S)
    try:
        _prepare(connection)
        connection.sendall(token.encode())
        _ping(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: socket.socket) -> None:
    connection.settimeout(STALL_TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _DROP)


def _ping(connection: socket.socket) -> float:
    began = time.perf_counter()
    connection.sendall(_PING)
    _exactly(connection, 1)
    return time.perf_counter() - began


def _push(connection: socket.socket, seconds: float) -> float:
    """Send until the other end, which measures, answers with the rate; at most for `seconds`.

    Raises:
        OSError: the other end closed the connection, as it does when it needs no answer.
    """
    block = bytes(_BLOCK)
    deadline = time.monotonic() + seconds
    connection.setblocking(False)
    while (left := deadline - time.monotonic()) > 0:
        answer, room, _ = select.select([connection], [connection], [], left)
        if answer:
            connection.settimeout(STALL_TIMEOUT_S)
            return _NUMBER.unpack(_exactly(connection, _NUMBER.size))[0]
        if room:
            with contextlib.suppress(BlockingIOError):
                connection.send(block)
    raise TimeoutError("timed out")


def _arriving_rate(connection: socket.socket, seconds: float) -> float:
    """Receive for `seconds`; returns bits per second, not counting the first SETTLING of them."""
    buffer = bytearray(_BLOCK)
    begin = settled = None
    total = counted = 0
    while True:
        count = connection.recv_into(buffer)
        if not count:
            raise EOFError("closed the connection")
        now = time.perf_counter()
        total += count
        begin = now if begin is None else begin
        if settled is None and now - begin >= SETTLING * seconds:
            settled, counted = now, total
        elif settled is not None and now - begin >= seconds:
            return 8 * (total - counted) / (now - settled)


def _drain(connection: socket.socket) -> None:
    """Wait until the other end has read the last data sent to it and closes."""
    buffer = bytearray(_BLOCK)
    while connection.recv_into(buffer):
        pass


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            raise EOFError("closed the connection")
        parts += part
    return bytes(parts)
