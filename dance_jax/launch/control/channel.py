"""The control channel: ZeroMQ sockets that only processes with the launch's key can use (CURVE).

Every launch has its own random key, handed to the servers over ssh (or given by the user if other
launchers start the servers). All secrets are derived from the key, so a process without it can
neither send nor receive; messages are also encrypted. ZeroMQ makes a broken connection again, and
no message is lost or repeated then (`session`).
"""

from __future__ import annotations

import collections
import functools
import hashlib
import math
import secrets
import socket
import time
from collections.abc import Iterable, Sequence

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from dance_jax.launch.control.session import Session

#: Seconds between heartbeats; seconds without one after which a process counts as lost. Suspended,
#: swapped-out and starved processes are silent for less.
ALIVE_INTERVAL_S, ALIVE_TIMEOUT_S = 1.0, 75.0
#: Seconds in which a process whose connection was closed must have made a new one.
RECONNECT_S = 3.0
#: Seconds between two looks at messages that are not acknowledged.
KEEP_UP_S = 1.0
#: Looks without a frame from the parent after which it is asked for one, and after which a server
#: connects anew: after a cut of 20 s, TCP would try the old connection again only 9 s later.
SILENT_LOOKS, LOST_LOOKS = 3, 6
#: Most frames that are read at once, so that nothing else waits for long.
MOST_AT_ONCE = 256


def server_identity(rank: int) -> str:
    """Identity of a server's process."""
    return f"server-{rank}"


def pulse_identity(rank: int) -> str:
    """Identity of an engine's signs of life."""
    return f"pulse-{rank}"


def node_identity(rank: int) -> str:
    """Identity of the launcher on another node."""
    return f"node-{rank}"


def bracketed(host: str) -> str:
    """The host as written before a port: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def new_key() -> bytes:
    """Make a launch's key: 32 random bytes."""
    return secrets.token_bytes(32)


def derived(key: bytes, role: str) -> bytes:
    """Derive 32 secret bytes for one use of the launch's key."""
    return hashlib.blake2b(role.encode(), key=key, digest_size=32).digest()


def _curve_pair(key: bytes, role: str) -> tuple[bytes, bytes]:
    """(public, secret) key of one end, in ZeroMQ's text form."""
    secret = z85.encode(derived(key, role))
    return zmq.curve_public(secret), secret


def _keep_alive(end: zmq.Socket) -> None:
    """Detect vanished peers soon, never disconnect idle ones, and never block on slow ones."""
    end.setsockopt(zmq.SNDHWM, 0)  # sessions bound what is sent
    end.setsockopt(zmq.RCVHWM, 0)
    end.setsockopt(zmq.HEARTBEAT_IVL, int(1000 * ALIVE_INTERVAL_S))
    end.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(1000 * ALIVE_TIMEOUT_S))


class _Members:
    """Decides for ZeroMQ which peers may connect."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return secrets.compare_digest(key, self._public)


class ControlListener:
    """The parent's end: a ROUTER socket, on loopback for the servers of this machine.

    Used by one thread at a time.

    Args:
        key: of the launch.
        peers: identities of the other ends.
        port: on loopback; 0: a free port.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, key: bytes, peers: Iterable[str], port: int = 0) -> None:
        self._context = zmq.Context()
        self._guard = ThreadAuthenticator(self._context)
        self._guard.start()
        self._guard.configure_curve_callback(
            credentials_provider=_Members(_curve_pair(key, "server")[0])
        )
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A server that reconnects takes over its old identity.
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.setsockopt(zmq.IPV6, 1)
        _keep_alive(self.socket)
        self.socket.curve_server = True
        self.socket.curve_publickey, self.socket.curve_secretkey = _curve_pair(key, "parent")
        self._sessions = {
            peer: Session(functools.partial(self._transmit, peer.encode())) for peer in peers
        }
        self._kept_up = time.monotonic()
        #: Frames without a known sender: after a handover, the old connection's are such.
        self.unknown = 0
        #: Port for this machine's servers.
        try:
            self.port = self.listen(["127.0.0.1"], port)
        except OSError:
            self.close()
            raise

    @property
    def private(self) -> str:
        """Endpoint for this machine's servers."""
        return f"tcp://127.0.0.1:{self.port}"

    def listen(self, addresses: Sequence[str], port: int) -> int:
        """Also listen on these addresses, all at one port; returns the port.

        Args:
            addresses: of this machine, as IP addresses or names.
            port: 0 for a free port.

        Raises:
            OSError: an address is not an address of this machine, or the port is taken.
        """
        for address in addresses:
            # ZeroMQ accepts only IP addresses and interfaces.
            number = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0]
            try:
                self.socket.bind(f"tcp://{bracketed(str(number))}:{port or '*'}")
            except zmq.ZMQError as error:
                raise OSError(error.errno, f"{address}, port {port or 'any'}: {error}") from error
            endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
            port = int(endpoint.rpartition(":")[2])
        return port

    def send(self, peer: str, content: bytes) -> None:
        """Send a message without waiting; the peer gets it as soon as it is connected."""
        self._sessions[peer].send(content)

    def receive(self, timeout_s: float = 0.0) -> list[tuple[str, bytes]]:
        """The messages that have arrived, as (peer, content); waits for the first if none has.

        Call this at least once a second, which also keeps up with what peers have received.
        """
        self._keep_up()
        messages: list[tuple[str, bytes]] = []
        deadline = time.monotonic() + timeout_s
        while not messages:
            left_s = deadline - time.monotonic()
            arrived = self.socket.poll(max(0, math.ceil(1000 * left_s)))
            messages = self._read()
            if not arrived and left_s <= 0:
                break
        return messages

    def connected(self, peer: str) -> bool:
        """Whether a frame can be sent to the peer now; asks what the peer has received."""
        return self._sessions[peer].ask()

    def heard(self, peer: str) -> int:
        """Number of frames from the peer so far, which grows by the answer to this question."""
        session = self._sessions[peer]
        session.ask()
        return session.heard

    def close(self, linger_s: float = 0.5) -> None:
        """Close everything, with up to `linger_s` to send pending messages; may be called twice."""
        if not self.socket.closed:
            self.socket.close(linger=int(1000 * linger_s))
            self._guard.stop()
            self._context.term()

    def _keep_up(self) -> None:
        now = time.monotonic()
        if now - self._kept_up >= KEEP_UP_S:
            self._kept_up = now
            for session in self._sessions.values():
                session.keep_up()

    def _read(self) -> list[tuple[str, bytes]]:
        """Read frames, a bounded number of them."""
        messages = []
        for _ in range(MOST_AT_ONCE):
            try:
                sender, *frame = self.socket.recv_multipart(flags=zmq.DONTWAIT)
            except zmq.Again:
                break
            peer = sender.decode(errors="replace")
            session = self._sessions.get(peer)
            content = None if session is None else _content(session, frame)
            if content is not None:
                messages.append((peer, content))
            elif session is None:
                self.unknown += 1
        return messages

    def _transmit(self, peer: bytes, head: bytes, content: bytes) -> bool:
        return _transmitted(self.socket, peer, head, content)


class ControlConnection:
    """A server's end: a DEALER socket, used by one thread at a time."""

    def __init__(self, endpoint: str, key: bytes, identity: str) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, identity.encode())
        self.socket.setsockopt(zmq.IPV6, 1)
        _keep_alive(self.socket)
        self.socket.curve_publickey, self.socket.curve_secretkey = _curve_pair(key, "server")
        self.socket.curve_serverkey = _curve_pair(key, "parent")[0]
        # A host that comes back is tried every few seconds, not after minutes.
        self.socket.setsockopt(zmq.CONNECT_TIMEOUT, int(1000 * RECONNECT_S))
        # What a broken connection has not sent is sent again by the session.
        self.socket.setsockopt(zmq.LINGER, 0)
        self._session = Session(functools.partial(_transmitted, self.socket))
        self._kept_up = float("-inf")
        #: Frames heard at the latest look, and looks since a frame was heard.
        self._heard = self._silent_looks = 0
        self._messages: collections.deque[bytes] = collections.deque()
        self._endpoint = endpoint
        self.socket.connect(endpoint)

    @property
    def heard(self) -> int:
        """Number of frames from the parent so far."""
        return self._session.heard

    @property
    def unacknowledged(self) -> int:
        """Number of messages that the parent may not have received."""
        return self._session.unacknowledged

    def send(self, content: bytes) -> None:
        """Send a message without waiting; the parent gets it as soon as it is connected."""
        self._session.send(content)

    def waits(self, timeout_s: float = 0.0) -> bool:
        """Whether a message has arrived, or arrives within `timeout_s`.

        Call this at least once a second while idle, which also keeps up with what the parent has
        received.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._keep_up()
            left_s = deadline - time.monotonic()
            if not self._messages and left_s > 0:
                self.socket.poll(math.ceil(1000 * min(left_s, KEEP_UP_S)))
            self._read()
            if self._messages or left_s <= 0:
                return bool(self._messages)

    def receive(self) -> bytes:
        """Wait for the parent's next message."""
        while not self.waits(KEEP_UP_S):
            pass
        return self._messages.popleft()

    def arrived(self) -> list[bytes]:
        """All messages that have arrived."""
        self.waits()
        messages = list(self._messages)
        self._messages.clear()
        return messages

    def close(self, linger_s: float = 1.0) -> None:
        """Close the connection, with up to `linger_s` until the parent has all messages.

        May be called twice.
        """
        if self.socket.closed:
            return
        deadline = time.monotonic() + linger_s
        while self.unacknowledged and time.monotonic() < deadline:
            self._session.ask()
            self.socket.poll(100)
            self._read()
        self.socket.close()
        self._context.term()

    def _keep_up(self) -> None:
        now = time.monotonic()
        if now - self._kept_up >= KEEP_UP_S:
            self._kept_up = now
            self._session.keep_up()
            self._look()

    def _look(self) -> None:
        """Connect anew if the parent answers no more.

        Looks are counted instead of seconds, because this process may pause.
        """
        silent = self._heard == self._session.heard
        self._heard = self._session.heard
        self._silent_looks = self._silent_looks + 1 if silent else 0
        if self._silent_looks >= LOST_LOOKS:
            self.socket.disconnect(self._endpoint)
            self.socket.connect(self._endpoint)
            self._silent_looks = 0
        if self._silent_looks >= SILENT_LOOKS:
            self._session.ask()

    def _read(self) -> None:
        for _ in range(MOST_AT_ONCE):
            try:
                frame = self.socket.recv_multipart(flags=zmq.DONTWAIT)
            except zmq.Again:
                return
            content = _content(self._session, frame)
            if content is not None:
                self._messages.append(content)


def _content(session: Session, frame: Sequence[bytes]) -> bytes | None:
    """The next message of a session, if the frame has it."""
    if len(frame) != 2:
        return None
    try:
        return session.receive(*frame)
    except ValueError:
        return None


def _transmitted(end: zmq.Socket, *parts: bytes) -> bool:
    """Give a frame to ZeroMQ; returns False if it cannot take the frame now."""
    try:
        end.send_multipart(parts, flags=zmq.DONTWAIT)
    except zmq.ZMQError as error:
        if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
            return False
        raise
    return True
