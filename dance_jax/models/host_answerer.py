"""Answers expert calls from other servers in a Python thread, like native/answerer.cc."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dance_jax.models.call_messages import (
    DONE,
    NOT_HERE,
    AnswerHead,
    CallChannel,
    CallHead,
    pack,
    poll,
)
from dance_jax.models.calls import TRACE_KINDS, TRACE_OUTCOMES, TraceEvent
from dance_jax.models.host_state import MOST_UNANSWERED, HostState

#: Most microseconds that an answer's head can hold.
_MOST_US = 2**32 - 1


@dataclasses.dataclass
class _Line:
    """A connection on which a peer calls this server."""

    peer: int
    channel: CallChannel
    #: Number of the peer's calls that wait to be computed.
    waiting: int = 0

    @property
    def reads(self) -> bool:
        """Whether to read more calls; beyond the limit they stay in the connection."""
        return self.waiting + self.channel.unsent < MOST_UNANSWERED


class _Call(NamedTuple):
    """A call that waits to be computed."""

    line: _Line
    head: CallHead
    body: memoryview
    #: Time of arrival in ns.
    arrived: int


class _Content(NamedTuple):
    """The decoded body of a call; without rows if the call does not fit this model."""

    sane: bool
    #: float32 [n, d]; int [n, k], -1 for none; float32 [n, k].
    x: np.ndarray
    expert: np.ndarray
    weight: np.ndarray


class HostAnswerer:
    """The thread that answers calls, and its connections."""

    def __init__(self, state: HostState) -> None:
        self._state = state
        #: Guards `_accepted` and `_closed`.
        self._lock = threading.Lock()
        self._accepted: list[tuple[int, socket.socket]] = []
        self._closed = False
        self._wake, woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken = CallChannel(woken)
        self._lines: dict[CallChannel, _Line] = {}
        self._calls: list[_Call] = []
        self._thread = threading.Thread(target=self._serve, daemon=True, name="answerer")
        self._thread.start()

    def accept(self, peer: int, connection: socket.socket) -> None:
        """Take over a connection on which a peer calls; any thread may call this."""
        with self._lock:
            if self._closed:
                connection.close()
                return
            self._accepted.append((peer, connection))
        self._wake_up()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._wake_up()
        self._thread.join()
        self._wake.close()

    def _wake_up(self) -> None:
        # A full socket buffer is fine: it wakes the thread too.
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def _serve(self) -> None:
        try:
            while self._adopt():
                self._receive()
                if self._calls:
                    self._answer_next()
                for channel in [each for each in self._lines if each.closed]:
                    self._lines.pop(channel).channel.close()
        finally:
            # Close all connections, so that no caller waits for a thread that has ended.
            self._woken.close()
            for channel in self._lines:
                channel.close()
            with self._lock:
                self._closed = True
                for _, connection in self._accepted:
                    connection.close()

    def _adopt(self) -> bool:
        """Take over new connections; return False if the thread must end."""
        with self._lock:
            if self._closed:
                return False
            accepted, self._accepted = self._accepted, []
        for peer, connection in accepted:
            channel = CallChannel(connection)
            self._lines[channel] = _Line(peer, channel)
        return True

    def _receive(self) -> None:
        """Read the calls that have arrived; wait for one if no call waits to be computed."""
        for line in self._lines.values():
            line.channel.paused = not line.reads
        spec = self._state.spec
        for channel in poll([self._woken, *self._lines], 0.0 if self._calls else None):
            if channel is self._woken:
                channel.drain()
                continue
            line = self._lines[channel]
            for head, body in channel.read(CallHead, spec.wire, spec.most_rows):
                self._calls.append(_Call(line, head, body, time.monotonic_ns()))
                line.waiting += 1
                if not line.reads:
                    break

    def _answer_next(self) -> None:
        """Answer the oldest call together with other calls for the same layer."""
        begin = time.monotonic_ns()
        calls = self._take_next()
        contents = [self._read(call) for call in calls]
        computed = self._compute(calls[0].head.layer, contents)
        end = time.monotonic_ns()
        served = any(len(content.x) for content in contents)
        self._state.sum(served_s=1e-9 * (end - begin), served_batches=served)
        event = TraceEvent(compute_begin=begin, compute_end=end, end=end, calls=len(calls))
        for call, content, own in zip(calls, contents, computed, strict=True):
            self._answer(call, content, *own, event)

    def _take_next(self) -> list[_Call]:
        """Take the oldest call and others for its layer, up to `most_rows` rows in total."""
        taken: list[_Call] = []
        left: list[_Call] = []
        rows = 0
        for call in self._calls:
            fits = not taken or rows + call.head.rows <= self._state.spec.most_rows
            if call.head.layer == self._calls[0].head.layer and fits:
                taken.append(call)
                rows += call.head.rows
                call.line.waiting -= 1
            else:
                left.append(call)
        self._calls = left
        return taken

    def _read(self, call: _Call) -> _Content:
        spec, (layer, _, _, rows, pairs), body = self._state.spec, call.head, call.body
        wire = spec.wire
        weights_at = rows + pairs * wire.number.itemsize
        rows_at = weights_at + pairs * wire.weight.itemsize
        pairs_n = np.frombuffer(body, np.uint8, rows)
        experts = np.frombuffer(body, wire.number, pairs, rows)
        sane = layer < spec.layers and pairs_n.sum() == pairs and (pairs_n <= spec.k).all()
        expert_nk = np.full((rows, spec.k), -1)
        weight_nk = np.zeros((rows, spec.k), np.float32)
        # An expert number that is too large would refer to an expert of another layer.
        if not sane or (experts >= spec.experts).any():
            x_nd = np.zeros((0, wire.d), np.float32)
            return _Content(False, x_nd, expert_nk[:0], weight_nk[:0])
        there_nk = np.arange(spec.k) < pairs_n[:, None]
        expert_nk[there_nk] = experts
        weight_nk[there_nk] = np.frombuffer(body, wire.weight, pairs, weights_at)
        return _Content(True, wire.decode(body[rows_at:]), expert_nk, weight_nk)

    def _compute(
        self, layer: int, contents: Sequence[_Content]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each call, its sums and which of its experts are here (see `Compute`)."""
        _, *columns = zip(*contents, strict=True)
        x_nd, expert_nk, weight_nk = map(np.concatenate, columns)
        sums_nd, here_nk = x_nd, expert_nk < 0
        if len(x_nd):
            sums_nd, here_nk = self._state.compute(layer, x_nd, expert_nk, weight_nk)
        starts = np.cumsum([len(content.x) for content in contents])[:-1]
        return zip(np.split(sums_nd, starts), np.split(here_nk, starts), strict=True)

    def _answer(
        self,
        call: _Call,
        content: _Content,
        sums_nd: np.ndarray,
        here_nk: np.ndarray,
        event: TraceEvent,
    ) -> None:
        """Send the answer to a call.

        Args:
            event: trace event with the fields that all calls of the computation share.
        """
        missing = np.unique(content.expert[~here_nk])
        done = content.sane and (not len(missing) or here_nk[content.expert >= 0].any())
        if not done:
            sums_nd, missing = sums_nd[:0], missing[:0]
        queued_ns = event.compute_begin - call.arrived
        computed_ns = event.compute_end - event.compute_begin
        head = AnswerHead(
            DONE if done else NOT_HERE,
            call.head.id,
            self._state.tables[0].version,
            rows=len(sums_nd),
            queued_us=min(queued_ns // 1000, _MOST_US),
            computed_us=min(computed_ns // 1000, _MOST_US),
            missing=len(missing),
        )
        message = pack(head, sums_nd.astype("<f4").tobytes(), missing.astype("<u2").tobytes())
        self._state.count(
            call.line.peer,
            answered=1,
            answered_rows=head.rows,
            queued_ns=queued_ns,
            bytes_sent=len(message),
            bytes_received=call.head.form.size + len(call.body),
        )
        call.line.channel.send(message)
        event = event._replace(
            begin=call.arrived,
            arrived=call.arrived,
            step=call.head.step,
            id=call.head.id,
            kind=TRACE_KINDS.index("served"),
            layer=call.head.layer,
            peer=call.line.peer,
            rows=call.head.rows,
            outcome=TRACE_OUTCOMES.index("answered" if head.whole else "refused"),
        )
        self._state.record(event)
