"""A control channel on an asyncio event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

import zmq

from dance_jax.launch.control.channel import KEEP_UP_S

Message = TypeVar("Message")


class LoopChannel(Generic[Message]):
    """Passes the messages of one end of a control channel to a function.

    Args:
        socket: of this end.
        arrived: reads the messages that have arrived, and keeps up with the other end.
        on_message: called on the event loop with each message.
    """

    def __init__(
        self,
        socket: zmq.Socket,
        arrived: Callable[[], list[Message]],
        on_message: Callable[[Message], None],
    ) -> None:
        self._socket, self._arrived, self._on_message = socket, arrived, on_message
        self._loop = asyncio.get_running_loop()
        self._descriptor: int = socket.getsockopt(zmq.FD)  # type: ignore[assignment]
        self._open = True
        self._loop.add_reader(self._descriptor, self._read)
        self._timer = self._loop.call_soon(self._keep_up)

    def look_again(self) -> None:
        """Call this after sending, which may consume an edge of the edge-triggered descriptor."""
        if self._open:
            self._loop.call_soon(self._read)

    def close(self) -> None:
        """Stop calling `on_message`."""
        if self._open:
            self._open = False
            self._timer.cancel()
            self._loop.remove_reader(self._descriptor)

    def _keep_up(self) -> None:
        self._read()
        if self._open:
            self._timer = self._loop.call_later(KEEP_UP_S, self._keep_up)

    def _read(self) -> None:
        while self._open:
            for message in self._arrived():
                if not self._open:  # `on_message` may close this channel
                    return
                self._on_message(message)
            if not self._open or not self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # type: ignore
                return
