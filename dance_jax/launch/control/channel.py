"""The control channel: ZeroMQ sockets that only processes with the launch's key can use (CURVE).

Every launch has its own random key, handed to the servers over ssh (or given by the user if other
launchers start the servers). All secrets are derived from the key, so a process without it can
neither send nor receive; messages are also encrypted.
"""

from __future__ import annotations

import hashlib
import secrets
import socket
from collections.abc import Sequence

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

#: Seconds between heartbeats; seconds without one after which a connection counts as lost.
ALIVE_INTERVAL_S, ALIVE_TIMEOUT_S = 1.0, 5.0


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
    """Detect vanished peers soon, and never disconnect idle ones."""
    end.setsockopt(zmq.HEARTBEAT_IVL, int(1000 * ALIVE_INTERVAL_S))
    end.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(1000 * ALIVE_TIMEOUT_S))


class _Members:
    """Decides for ZeroMQ which peers may connect."""

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
        # A server that reconnects takes over its old identity.
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.setsockopt(zmq.IPV6, 1)
        _keep_alive(self.socket)
        self.socket.curve_server = True
        self.socket.curve_publickey, self.socket.curve_secretkey = _curve_pair(key, "parent")
        #: Endpoint for this machine's servers.
        self.private = f"tcp://127.0.0.1:{self.listen(['127.0.0.1'], 0)}"

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

    def close(self, linger_s: float = 0.5) -> None:
        """Close everything, with up to `linger_s` to send pending messages; may be called twice."""
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
        """Close the connection, with up to a second to send pending messages."""
        self.socket.close()
        self._context.term()
