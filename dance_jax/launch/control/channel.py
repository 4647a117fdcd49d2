"""The control channel: ZeroMQ sockets that only those with the launch's key can use (CURVE).

Every launch has a key of its own, drawn at random and handed to the servers over ssh (or, where
another launcher starts them, given by the user). All secrets are derived from it, so whoever
lacks it can neither speak nor listen; messages are encrypted too.
"""

from __future__ import annotations

import hashlib
import secrets
import socket
from collections.abc import Sequence

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

#: Seconds between signs of life on a connection, and until one without them counts as lost.
ALIVE_INTERVAL_S, ALIVE_TIMEOUT_S = 1.0, 5.0


def bracketed(host: str) -> str:
    """The host as it stands before a port: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def new_key() -> bytes:
    """A launch's key: 32 random bytes."""
    return secrets.token_bytes(32)


def derived(key: bytes, role: str) -> bytes:
    """32 secret bytes for one use of the launch's key."""
    return hashlib.blake2b(role.encode(), key=key, digest_size=32).digest()


def _curve_pair(key: bytes, role: str) -> tuple[bytes, bytes]:
    """(public, secret) key of one end, in ZeroMQ's text form."""
    secret = z85.encode(derived(key, role))
    return zmq.curve_public(secret), secret


def _keep_alive(end: zmq.Socket) -> None:
    """A peer that vanishes counts as disconnected soon, an idle one never does."""
    end.setsockopt(zmq.HEARTBEAT_IVL, int(1000 * ALIVE_INTERVAL_S))
    end.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(1000 * ALIVE_TIMEOUT_S))


class _Members:
    """Tells ZeroMQ who may connect."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return secrets.compare_digest(key, self._public)


class ControlListener:
    """The parent's end: a ROUTER socket, on loopback for the servers of this machine."""

    def __init__(self, key: bytes) -> None:
        self._context = zmq.Context()
        self._guard = ThreadAuthenticator(self._context)
        self._guard.start()
        self._guard.configure_curve_callback(
            credentials_provider=_Members(_curve_pair(key, "server")[0])
        )
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A server that lost its connection and comes again takes its old name over.
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.setsockopt(zmq.IPV6, 1)
        _keep_alive(self.socket)
        self.socket.curve_server = True
        self.socket.curve_publickey, self.socket.curve_secretkey = _curve_pair(key, "parent")
        #: Endpoint for this machine's servers.
        self.private = f"tcp://127.0.0.1:{self.listen(['127.0.0.1'], 0)}"

    def listen(self, addresses: Sequence[str], port: int) -> int:
        """Listens on these addresses of this machine too, all at one port; returns it.

        Args:
            addresses: numbers or names.
            port: 0 for a free one.

        Raises:
            OSError: one is not an address of this machine, or the port is taken.
        """
        for address in addresses:
            # ZeroMQ takes numbers and interfaces only.
            number = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0]
            try:
                self.socket.bind(f"tcp://{bracketed(str(number))}:{port or '*'}")
            except zmq.ZMQError as error:
                raise OSError(error.errno, f"{address}, port {port or 'any'}: {error}") from error
            endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
            port = int(endpoint.rpartition(":")[2])
        return port

    def close(self, linger_s: float = 0.5) -> None:
        """Closes everything, with so long to send what is left; may be called twice."""
        if not self.socket.closed:
            self.socket.close(linger=int(1000 * linger_s))
            self._guard.stop()
            self._context.term()


class ControlConnection:
    """A server's end: a DEALER socket, used by one thread."""

    def __init__(self, endpoint: str, key: bytes, identity: str) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, identity.encode())
        self.socket.setsockopt(zmq.LINGER, 1000)
        self.socket.setsockopt(zmq.IPV6, 1)
        _keep_alive(self.socket)
        self.socket.curve_publickey, self.socket.curve_secretkey = _curve_pair(key, "server")
        self.socket.curve_serverkey = _curve_pair(key, "parent")[0]
        self.socket.connect(endpoint)

    def close(self) -> None:
        """Sends what is left, for a second at most."""
        self.socket.close()
        self._context.term()
