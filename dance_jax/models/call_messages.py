"""What servers say to each other in expert calls, in Python: native/wire.h.

The heads of messages, how rows travel, and the connections that carry them.
"""

from __future__ import annotations

import collections
import contextlib
import select
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import ml_dtypes
import numpy as np


class Wire:
    """How rows travel, as `Wire` in wire.h; `experts` of a layer are named in a call."""

    def __init__(self, kind: str, d: int, experts: int) -> None:
        self._kind, self.d = kind, d
        #: Of an expert's weight; of its number.
        self.weight = np.dtype("<f4" if kind == "float32" else ml_dtypes.bfloat16)
        self.number = np.dtype(np.uint8 if experts <= 256 else "<u2")
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
        """What experts of this very server see of rows or weights: what those of others would, but
        for eight bits."""
        if self._kind != "bfloat16":
            return x_nd
        return x_nd.astype(ml_dtypes.bfloat16).astype(np.float32)


class CallHead(NamedTuple):
    """Before an expert call, as in wire.h."""

    #: Of the model's layers with routed experts.
    layer: int
    id: int
    #: Of the caller.
    step: int
    rows: int
    pairs: int

    # Before these fields: magic and kind.
    form = struct.Struct("<IHHQqII")
    begin = (0x63786A64, 1)

    def sane(self, most_rows: int) -> bool:
        """It may be a call of so many rows at most. A count of pairs has one byte."""
        return self.rows <= most_rows and self.pairs <= 255 * self.rows

    def body_bytes(self, wire: Wire) -> int:
        return self.rows * (1 + wire.bytes) + self.pairs * (
            wire.number.itemsize + wire.weight.itemsize
        )


#: `AnswerHead.status`: sums of all rows, but for the experts that are missing; nothing is here.
DONE, NOT_HERE = 0, 1


class AnswerHead(NamedTuple):
    """Before an answer, as in wire.h."""

    status: int
    id: int
    #: Of the callee's table.
    version: int
    rows: int
    #: Microseconds that the call waited there, and was computed.
    queued_us: int
    computed_us: int
    #: Experts that the call wanted and that are not here.
    missing: int

    form = struct.Struct("<IHHQqIIII")
    begin = (0x61786A64, 2)

    @property
    def whole(self) -> bool:
        """Nothing that the call wanted is missing."""
        return self.status == DONE and not self.missing

    def sane(self, most_rows: int) -> bool:
        return self.rows <= most_rows and self.missing <= 1 << 16

    def body_bytes(self, wire: Wire) -> int:
        return 4 * wire.d * self.rows + 2 * self.missing


_Head = TypeVar("_Head", CallHead, AnswerHead)


def pack(head: CallHead | AnswerHead, *body: bytes) -> bytes:
    """A whole message."""
    return b"".join((head.form.pack(*head.begin, *head), *body))


class CallChannel:
    """A connection that does not block; one thread's."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self.closed = False
        #: Of one message.
        self._in = bytearray()
        #: Messages that the connection has not taken, the first one perhaps in part.
        self._out: collections.deque[memoryview] = collections.deque()
        #: Nothing is read from it for now.
        self.paused = False

    @property
    def events(self) -> int:
        return (0 if self.paused else select.POLLIN) | (select.POLLOUT if self._out else 0)

    @property
    def unsent(self) -> int:
        """Messages that the connection has not taken."""
        return len(self._out)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: bytes) -> None:
        """Sends what it can, and keeps the rest for `flush`."""
        self._out.append(memoryview(message))
        self.flush()

    def flush(self) -> None:
        while self._out and not self.closed:
            try:
                left = self._out[0][self._socket.send(self._out[0]) :]
            except BlockingIOError:
                return
            except OSError:
                self.closed = True
            else:
                if left:
                    self._out[0] = left
                else:
                    self._out.popleft()

    def read(
        self, kind: type[_Head], wire: Wire, most_rows: int
    ) -> Iterator[tuple[_Head, memoryview]]:
        """The messages that have come, each as its head and body; what is not asked for stays.

        Anything but a message of so many rows at most ends the connection.
        """
        size = kind.form.size
        while self._receive(size):
            magic, number, *fields = kind.form.unpack_from(self._in)
            head = kind._make(fields)
            if (magic, number) != kind.begin or not head.sane(most_rows):
                self.closed = True
            elif self._receive(size + head.body_bytes(wire)):
                body, self._in = memoryview(self._in)[size:], bytearray()
                yield head, body
            else:
                return

    def _receive(self, size: int) -> bool:
        """Until so many bytes are there; False: the rest has not come yet, or never will."""
        while len(self._in) < size and not self.closed:
            try:
                content = self._socket.recv(min(size - len(self._in), 1 << 20))
            except BlockingIOError:
                return False
            except OSError:
                content = b""
            self.closed = not content
            self._in += content
        return not self.closed

    def drain(self) -> None:
        """Forgets what has come; the other end sends now and then a byte."""
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(64):
                pass

    def close(self) -> None:
        self.closed = True
        self._socket.close()


def poll(channels: Iterable[CallChannel], timeout_s: float | None) -> list[CallChannel]:
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
