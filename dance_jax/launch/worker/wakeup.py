"""Wake-ups between resting servers, over a mesh of connections.

Servers step in lock step, so a server that gets a request while all rest must tell the others to
begin the next step too. The first server to begin a step after a rest rings the others with the
step's number; a ring for a past step is ignored.
"""

from __future__ import annotations

import struct
import time

import zmq

from dance_jax.models.connections import Connections

_NUMBER = struct.Struct("<Q")


class Wakeup:
    """One server's end of the mesh; all servers must create theirs at the same time.

    Args:
        connections: of this server.

    Raises:
        RuntimeError: a server cannot be reached, or does not have the key.
    """

    def __init__(self, connections: Connections) -> None:
        self._names = connections.names
        #: To all other servers, by rank.
        self._connections = connections.mesh("wakeup")
        self._unread = dict.fromkeys(self._connections, b"")
        #: Highest step number of all rings.
        self._rung = 0
        for connection in self._connections.values():
            connection.setblocking(False)

    def ring(self, next_step: int) -> None:
        """Tell all other servers that this server begins a step.

        Raises:
            RuntimeError: a server is gone, or has not read thousands of rings.
        """
        for rank, connection in self._connections.items():
            try:
                sent = connection.send(_NUMBER.pack(next_step))
            except OSError as error:
                raise RuntimeError(
                    f"server {self._names[rank]} closed the connection: {error}"
                ) from error
            if sent != _NUMBER.size:
                raise RuntimeError(f"server {self._names[rank]} does not read wake-ups")

    def wait(self, control: zmq.Socket, timeout_s: float, next_step: int) -> bool:
        """Rest until there is something to do, at most for `timeout_s`.

        Args:
            control: a message on this socket ends the rest.
            timeout_s: in seconds.
            next_step: number of the next step of this server.

        Returns:
            Whether another server has begun that step.

        Raises:
            RuntimeError: another server closed its connection.
        """
        deadline = time.monotonic() + timeout_s
        poller = zmq.Poller()
        poller.register(control, zmq.POLLIN)
        ranks = {connection.fileno(): rank for rank, connection in self._connections.items()}
        for descriptor in ranks:
            poller.register(descriptor, zmq.POLLIN)
        while self._rung < next_step:
            left = deadline - time.monotonic()
            # One millisecond more, because poll() rounds down and would spin in the last one.
            ready = dict(poller.poll(max(0, int(1000 * left) + 1))) if left > 0 else {}
            for descriptor in ranks.keys() & ready.keys():
                self._read(ranks[descriptor])
            if control in ready or not ready:
                break
        return self._rung >= next_step

    def _read(self, rank: int) -> None:
        try:
            received = self._connections[rank].recv(4096)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            raise RuntimeError(f"server {self._names[rank]} closed the connection")
        unread = self._unread[rank] + received
        whole = len(unread) - len(unread) % _NUMBER.size
        self._unread[rank] = unread[whole:]
        for (number,) in _NUMBER.iter_unpack(unread[:whole]):
            self._rung = max(self._rung, number)

    def close(self) -> None:
        """Close all connections."""
        for connection in self._connections.values():
            connection.close()
