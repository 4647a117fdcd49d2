"""Limits of what clients may leave unread."""

from __future__ import annotations

import socket

#: Seconds for which a client may read nothing of an answer that waits for it.
UNREAD_S = 60.0
#: Deltas of a stream that may wait while its client does not read.
MAX_UNREAD = 4096
#: Bytes of an answer that may wait in the kernel, in addition to those that are under way.
UNSENT_BYTES = 1 << 17


def limit_unread(listener: socket.socket) -> None:
    """Limit what clients can leave unread, on all connections that a listening socket accepts.

    The kernel keeps at most UNSENT_BYTES unsent, and ends a connection whose client has read
    nothing for UNREAD_S: also one whose whole answer has been written. Systems other than Linux
    lack one option or both; `delivery.EventStream` limits streams there.
    """
    for name, value in (
        ("TCP_NOTSENT_LOWAT", UNSENT_BYTES),
        ("TCP_USER_TIMEOUT", int(UNREAD_S * 1000)),
    ):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
