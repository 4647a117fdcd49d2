"""Links with a latency: what a server sends comes later, in full and in order.

The kernel's own delay (netem) is not everywhere, so a relay in this process stands between the
server and each connection. Only the sender's side delays: one round trip of a message and its
answer takes two delays, and so do two rounds of a layer.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence

from dance_jax.models import links_cpu


class Delay:
    """How long what is sent is held back; may change at any time."""

    seconds = 0.0


def install(delay: Delay) -> None:
    """Links that are opened from here on are delayed."""
    open_links = links_cpu.open_links

    def open_delayed(
        rank: int, names: Sequence[str], connections: dict[int, socket.socket]
    ) -> None:
        relayed = {n: _relayed(connection, delay) for n, connection in connections.items()}
        open_links(rank, names, relayed)

    links_cpu.open_links = open_delayed


def _relayed(outer: socket.socket, delay: Delay) -> socket.socket:
    """A connection to this process that behaves like `outer`, later."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        inner = socket.create_connection(listener.getsockname())
        relay, _ = listener.accept()
    for connection in (outer, relay):
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    held: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def hold() -> None:
        while part := relay.recv(1 << 16):
            held.put((time.monotonic() + delay.seconds, part))

    def release() -> None:
        while True:
            due, part = held.get()
            time.sleep(max(due - time.monotonic(), 0))
            outer.sendall(part)

    def receive() -> None:
        while part := outer.recv(1 << 16):
            relay.sendall(part)
        relay.close()

    for work in (hold, release, receive):
        _in_background(work)
    return inner


def _in_background(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True, name="delay").start()
