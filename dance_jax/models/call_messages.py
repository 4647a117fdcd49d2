"""What servers say to each other in expert calls, in Python: native/wire.h.

The heads of messages, how rows travel, and the connections that carry them.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable, Iterable, Iterator

import ml_dtypes
import numpy as np

#: Heads of messages, see wire.h: magic, kind, layer, id, step, rows, pairs; and magic, kind,
#: status, id, version, rows, microseconds queued and computed, unused.
CALL, ANSWER = struct.Struct("<IHHQqII"), struct.Struct("<IHHQqIIII")
CALL_MAGIC, ANSWER_MAGIC = 0x63786A64, 0x61786A64
CALL_KIND, ANSWER_KIND = 1, 2
DONE, NOT_HERE = 0, 1


class Wire:
    """How rows travel, as `Wire` in wire.h."""

    def __init__(self, kind: str, d: int) -> None:
        self._kind, self.d = kind, d
        #: Of a row.
        self.bytes = {"float32": 4 * d, "bfloat16": 2 * d, "int8": 4 + d}[kind]

    def encode(self, x_nd: np.ndarray) -> bytes:
        if self._kind == "float32":
            return np.ascontiguousarray(x_nd, np.float32).tobytes()
        if self._kind == "bfloat16":
            return x_nd.astype(ml_dtypes.bfloat16).tobytes()
        # Eight bits have no NaN: the scale says that the row is none that can be sent.
        finite_n1 = np.isfinite(x_nd).all(1, keepdims=True)
        x_nd = np.where(finite_n1, x_nd, 0)
        scale_n1 = (np.abs(x_nd).max(1, keepdims=True) / 127).astype(np.float32)
        usable_n1 = scale_n1 >= np.finfo(np.float32).tiny
        codes_nd = np.where(usable_n1, np.rint(x_nd / np.where(usable_n1, scale_n1, 1)), 0)
        scale_n1 = np.where(finite_n1, scale_n1, np.float32(np.nan))
        rows = np.concatenate([scale_n1.view(np.int8), codes_nd.astype(np.int8)], axis=1)
        return rows.tobytes()

    def decode(self, content: memoryview) -> np.ndarray:
        if self._kind == "float32":
            return np.frombuffer(content, np.float32).reshape(-1, self.d)
        if self._kind == "bfloat16":
            halves = np.frombuffer(content, ml_dtypes.bfloat16)
            return halves.astype(np.float32).reshape(-1, self.d)
        rows = np.frombuffer(content, np.int8).reshape(-1, self.bytes)
        scale_n1 = np.ascontiguousarray(rows[:, :4]).view(np.float32)
        return rows[:, 4:] * scale_n1

    def round(self, x_nd: np.ndarray) -> np.ndarray:
        """What experts of this very server see: what those of others would, but for eight bits."""
        if self._kind != "bfloat16":
            return x_nd
        return x_nd.astype(ml_dtypes.bfloat16).astype(np.float32)


class Channel:
    """A connection that does not block; one thread's."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self.closed = False
        self._in, self._out = bytearray(), bytearray()
        #: Nothing is read from it for now.
        self.paused = False

    @property
    def events(self) -> int:
        return (0 if self.paused else select.POLLIN) | (select.POLLOUT if self._out else 0)

    @property
    def sending(self) -> bool:
        """Something waits until the connection takes it."""
        return bool(self._out)

    @property
    def buffered(self) -> bool:
        """Something was received and not read."""
        return bool(self._in)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, *parts: bytes) -> None:
        """Sends what it can, and keeps the rest for `flush`."""
        self._out += b"".join(parts)
        self.flush()

    def flush(self) -> None:
        while self._out and not self.closed:
            try:
                del self._out[: self._socket.send(self._out)]
            except BlockingIOError:
                return
            except OSError:
                self.closed = True

    def read(self, head: struct.Struct, body_bytes: Callable[..., int]) -> Iterator[bytes]:
        """The whole messages that are there, head and body; what is not asked for stays.

        Args:
            body_bytes: of a head's fields; raises ValueError where they make no message, which
                ends the connection.
        """
        while not self.closed:
            while len(self._in) >= head.size:
                try:
                    size = head.size + body_bytes(*head.unpack_from(self._in))
                except ValueError:
                    self.closed = True
                    return
                if len(self._in) < size:
                    break
                message = bytes(self._in[:size])
                del self._in[:size]
                yield message
            try:
                content = self._socket.recv(1 << 20)
            except BlockingIOError:
                return
            except OSError:
                content = b""
            self.closed = not content
            self._in += content

    def close(self) -> None:
        self.closed = True
        self._socket.close()


def poll(channels: Iterable[Channel], timeout_s: float | None) -> list[Channel]:
    """Sends what waits; those that have something to read, once there is any or the time is up."""
    by_fd = {channel.fileno(): channel for channel in channels if not channel.closed}
    polled = select.poll()
    for fd, channel in by_fd.items():
        polled.register(fd, channel.events)
    readable = []
    for fd, events in polled.poll(None if timeout_s is None else 1000 * max(timeout_s, 0)):
        if events & ~select.POLLIN:  # a connection that has ended says so where it is not read, too
            by_fd[fd].flush()
        if events & ~select.POLLOUT and not by_fd[fd].paused:
            readable.append(by_fd[fd])
    return readable
