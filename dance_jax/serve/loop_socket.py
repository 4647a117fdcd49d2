"""A ZeroMQ socket on an asyncio event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import zmq


class LoopSocket:
    """Passes a socket's messages to a function, and sends without blocking.

    Args:
        socket: used only by this object from now on, but not closed by it.
        on_message: called on the event loop with the parts of each message.
    """

    def __init__(self, socket: zmq.Socket, on_message: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._descriptor: int = socket.getsockopt(zmq.FD)  # type: ignore[assignment]
        self._open = True
        self._loop.add_reader(self._descriptor, self._read)
        self._loop.call_soon(self._read)

    def send(self, *parts: bytes) -> None:
        """Send a message; it is lost if the peer is gone."""
        if not self._open:
            return
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart(parts, flags=zmq.DONTWAIT)
        # The descriptor is edge-triggered, and the send may have consumed an edge.
        self._loop.call_soon(self._read)

    def close(self) -> None:
        """Stop calling `on_message`."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._descriptor)

    def _read(self) -> None:
        while self._open and self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # type: ignore
            self._on_message(self._socket.recv_multipart(flags=zmq.DONTWAIT))
