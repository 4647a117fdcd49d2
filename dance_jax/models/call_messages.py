"""Messages of expert calls, from engine to engine, in Python: the same format as native/wire.h.

Message heads, the encoding of rows, and the connections that carry the messages.
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
    """Encoding of rows on the wire, as `Wire` in wire.h.

    Args:
        kind: "float32", "bfloat16" or "int8", the type of hidden states.
        d: width of a row.
        experts: routed experts per layer; determines the size of an expert number.
    """

    def __init__(self, kind: str, d: int, experts: int) -> None:
        self._kind, self.d = kind, d
        #: Type of an expert's weight, and of an expert's number.
        self.weight = np.dtype("<f4" if kind == "float32" else ml_dtypes.bfloat16)
        self.number = np.dtype(np.uint8 if experts <= 256 else "<u2")
        #: Bytes of a row.
        self.bytes = {"float32": 4 * d, "bfloat16": 2 * d, "int8": 4 + d}[kind]

    def encode(self, x_nd: np.ndarray) -> bytes:
        if self._kind == "float32":
            return np.ascontiguousarray(x_nd, np.float32).tobytes()
        if self._kind == "bfloat16":
            return x_nd.astype(ml_dtypes.bfloat16).tobytes()
        # int8 has no NaN: a NaN scale marks a row with values that are not finite.
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
        """Round rows or weights for local experts as the wire rounds them for remote experts.

        int8 is the exception: nothing is rounded to int8 for local experts.
        """
        if self._kind != "bfloat16":
            return x_nd
        return x_nd.astype(ml_dtypes.bfloat16).astype(np.float32)


class CallHead(NamedTuple):
    """Head of an expert call, as in wire.h."""

    #: Index among the model's layers with routed experts.
    layer: int
    id: int
    #: Number of the caller's step.
    step: int
    rows: int
    pairs: int

    # The struct begins with magic and kind, which precede the fields above.
    form = struct.Struct("<IHHQqII")
    begin = (0x63786A64, 1)

    def sane(self, most_rows: int) -> bool:
        """Whether this can be the head of a call with at most `most_rows` rows.

        A row's count of pairs is one byte, so a row has at most 255 pairs.
        """
        return self.rows <= most_rows and self.pairs <= 255 * self.rows

    def body_bytes(self, wire: Wire) -> int:
        return self.rows * (1 + wire.bytes) + self.pairs * (
            wire.number.itemsize + wire.weight.itemsize
        )


#: `AnswerHead.status`. DONE: the answer has sums for all rows, without the experts listed as
#: missing. NOT_HERE: the callee holds none of the experts.
DONE, NOT_HERE = 0, 1


class AnswerHead(NamedTuple):
    """Head of an answer, as in wire.h."""

    status: int
    id: int
    #: Version of the callee's table.
    version: int
    rows: int
    #: Microseconds that the call waited at the callee, and that its computation took.
    queued_us: int
    computed_us: int
    #: Number of requested experts that the callee does not hold.
    missing: int

    form = struct.Struct("<IHHQqIIII")
    begin = (0x61786A64, 2)

    @property
    def whole(self) -> bool:
        """Whether the answer covers every expert of the call."""
        return self.status == DONE and not self.missing

    def sane(self, most_rows: int) -> bool:
        return self.rows <= most_rows and self.missing <= 1 << 16

    def body_bytes(self, wire: Wire) -> int:
        return 4 * wire.d * self.rows + 2 * self.missing


_Head = TypeVar("_Head", CallHead, AnswerHead)


def pack(head: CallHead | AnswerHead, *body: bytes) -> bytes:
    """Serialise a message: the head, then the parts of its body."""
    return b"".join((head.form.pack(*head.begin, *head), *body))


class CallChannel:
    """A non-blocking connection; only one thread may use it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self.closed = False
        #: Bytes received so far of one message.
        self._in = bytearray()
        #: Messages not sent yet; of the first message a part may have been sent.
        self._out: collections.deque[memoryview] = collections.deque()
        #: While True, nothing is read from the connection (backpressure).
        self.paused = False

    @property
    def events(self) -> int:
        return (0 if self.paused else select.POLLIN) | (select.POLLOUT if self._out else 0)

    @property
    def unsent(self) -> int:
        """Number of messages that are not sent completely."""
        return len(self._out)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: bytes) -> None:
        """Send as much of the message as the connection takes now; `flush` sends the rest."""
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
        """Yield received messages as (head, body).

        Messages that the caller does not iterate over stay in the connection. Anything other than
        a message of this kind with at most `most_rows` rows closes the channel.
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
        """Read until `size` bytes of the message are here.

        Returns:
            False if the rest has not arrived yet, or the connection has ended.
        """
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
        """Discard received bytes, for a connection that carries only single wakeup bytes."""
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(64):
                pass

    def close(self) -> None:
        self.closed = True
        self._socket.close()


def poll(channels: Iterable[CallChannel], timeout_s: float | None) -> list[CallChannel]:
    """Flush pending messages and wait until a channel is readable or the timeout expires.

    Args:
        timeout_s: seconds; None to wait without limit.

    Returns:
        The readable channels.
    """
    by_fd = {channel.fileno(): channel for channel in channels if not channel.closed}
    polled = select.poll()
    for fd, channel in by_fd.items():
        polled.register(fd, channel.events)
    readable = []
    for fd, events in polled.poll(None if timeout_s is None else 1000 * max(timeout_s, 0)):
        if events & ~select.POLLIN:  # POLLHUP and POLLERR are reported even for a paused channel
            by_fd[fd].flush()
        if events & ~select.POLLOUT and not by_fd[fd].paused:
            readable.append(by_fd[fd])
    return readable
