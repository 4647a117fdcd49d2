"""Expert calls of one device, in Python; native/caller.cc is the same algorithm in C++."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import socket
import threading
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from dance_jax.models.call_messages import DONE, AnswerHead, CallChannel, CallHead, pack, poll
from dance_jax.models.calls import TRACE_KINDS, TRACE_OUTCOMES, TraceEvent
from dance_jax.models.counters import Moved
from dance_jax.models.host_state import MOST_GROUPS, MOST_UNANSWERED, HostState, Table

# The constants are the same as in caller.cc.

#: A call is late, or fails, after this many times its expected duration.
_LATE, _FAILED = 3, 10
#: ns that refused assignments wait for a new table in which some server holds their experts.
_PATIENCE_NS = 500_000_000
#: ns between two checks for a new table, and for new connections.
_LOOK_NS, _LOOK_SELDOM_NS = 5_000_000, 100_000_000
#: Weight of the latest answer in a pace; most bytes of an answer that counts as small.
_LEARN, _SMALL = 0.2, 8192
#: Least bytes of rows in a call when the rows for a server are split into several calls.
_GROUP_BYTES = 64 * 1024
#: Low bits of a call's id, a counter; the higher bits are the device.
_CALL_BITS = 48


class HostRows(NamedTuple):
    """One device's rows of a layer, on the host."""

    #: Index among the layers with routed experts.
    layer: int
    #: float32 [t, d].
    x: np.ndarray
    #: int32 [t, k] and float32 [t, k].
    expert: np.ndarray
    weight: np.ndarray
    #: bool [t], False for rows that are not routed.
    valid: np.ndarray

    @property
    def k(self) -> int:
        return self.expert.shape[1]


@functools.lru_cache(maxsize=1 << 16)
def choose(holders: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Choose the server to call for each of a row's experts, by the rule of placement/visit.py.

    Args:
        holders: for each expert, a bitmask of the servers that hold it.
        order: all servers, in the order in which the caller prefers to call them.

    Returns:
        A server for each expert; -1 if no server holds the expert.
    """
    found = [-1] * len(holders)
    while True:
        left = [mask if server < 0 else 0 for mask, server in zip(holders, found, strict=True)]
        best = max(order, key=lambda n: sum(mask >> n & 1 for mask in left))
        served = [i for i, mask in enumerate(left) if mask >> best & 1]
        if not served:
            return tuple(found)
        for i in served:
            found[i] = best


class _Pace:
    """Model of how long a peer's answers take: a constant plus a time per byte."""

    def __init__(self) -> None:
        self._base_s, self._byte_s = 0.02, 1e-6

    def expected(self, size: int) -> float:
        """Expected seconds for a call of `size` bytes."""
        return self._base_s + self._byte_s * size

    def learn(self, size: int, s: float) -> None:
        # Limit the effect of an outlier: a server that paused once is not slow from then on.
        s = min(s, _FAILED * self.expected(size))
        if size <= _SMALL:
            self._base_s += _LEARN * (s - self._base_s)
        else:
            self._byte_s += _LEARN * (max(0.0, s - self._base_s) / size - self._byte_s)


class _Sent(NamedTuple):
    """A call that was sent."""

    #: Trace event of the call, to be completed when the call ends.
    event: TraceEvent
    #: Bytes of the call and its answer, plus those of earlier calls that are not answered yet.
    queued: int


@dataclasses.dataclass
class _Line:
    """The connection to a peer that this device calls."""

    channel: CallChannel
    pace: _Pace
    #: Calls that the peer has not answered yet, by id.
    unanswered: dict[int, _Sent] = dataclasses.field(default_factory=dict)
    #: An answer is late; the peer gets no new calls until it has answered all earlier ones.
    suspect: bool = False

    @property
    def full(self) -> bool:
        return len(self.unanswered) >= MOST_UNANSWERED


@dataclasses.dataclass
class _Part:
    """Assignments of a layer's rows to experts that are requested from one server."""

    #: Rank of the server; -1 if no server holds the experts.
    peer: int
    #: The assignments, as ascending indices t * k + i into `HostRows.expert`; and their rows.
    places: np.ndarray
    rows: np.ndarray
    #: The tables from which the server was chosen.
    tables: tuple[Table, ...]
    #: Bitmask of the servers that were called for the same assignments before.
    asked: int
    #: "done": `sums` covers all assignments except those in `rest`. "nowhere": no server holds the
    #: experts; the part waits for a new table until `fail_at`.
    state: Literal["waiting", "done", "lost", "nowhere", "failed"] = "waiting"
    #: Id of the call; 0 if the call is not sent yet.
    id: int = 0
    #: Times in ns.
    repeat_at: int = 0
    fail_at: int = 0
    repeated: bool = False
    #: float32 [rows, d]; None if the server held none of the experts.
    sums: np.ndarray | None = None
    #: Parts that request from other servers what this server did not hold.
    rest: Sequence[_Part] = ()
    #: Parts that request the same from other servers, because this part's answer is late.
    instead: Sequence[_Part] = ()

    @property
    def answered(self) -> bool:
        """Whether the server has answered, and the parts in `rest` have succeeded."""
        return self.state == "done" and all(part.succeeded for part in self.rest)

    @property
    def succeeded(self) -> bool:
        return self.answered or (
            bool(self.instead) and all(part.succeeded for part in self.instead)
        )

    @property
    def resolved(self) -> bool:
        """Whether there is nothing left to wait for."""
        if self.state == "failed" or self.succeeded:
            return True
        others = (*self.rest, *self.instead)
        return self.state in ("done", "lost") and all(part.resolved for part in others)


class HostCaller:
    """The expert calls of one device's steps. Only one thread at a time may run a layer."""

    def __init__(self, state: HostState, device: int) -> None:
        self._state, self._spec, self._device = state, state.spec, device
        #: Connections to dialled peers, by rank.
        self._lines: dict[int, _Line] = {}
        self._lock = threading.Lock()
        self._dialled: list[tuple[int, socket.socket]] = []
        # Call ids are unique across the server's devices.
        self._ids = itertools.count(1 + (device << _CALL_BITS))
        #: Parts of the layer that runs.
        self._parts: list[_Part] = []
        self._tables = state.tables

    def dial(self, peer: int, connection: socket.socket) -> None:
        """Take over a connection to a peer, replacing the previous one; from any thread."""
        with self._lock:
            self._dialled.append((peer, connection))

    def close(self) -> None:
        for _, connection in self._dialled:
            connection.close()
        for line in self._lines.values():
            line.channel.close()

    def _adopt(self) -> None:
        with self._lock:
            dialled, self._dialled = self._dialled, []
        for peer, connection in dialled:
            line = self._lines.get(peer)
            if line is not None:
                self._forget(line)
                line.channel.close()
            self._lines[peer] = _Line(CallChannel(connection), line.pace if line else _Pace())
            # Calls on the old connection are lost.
            for part in self._parts:
                if part.state == "waiting" and part.id and part.peer == peer:
                    self._lose(part)

    def _forget(self, line: _Line) -> None:
        """Drop the unanswered calls of a connection that has ended."""
        for sent in line.unanswered.values():
            self._record(sent, "lost")
        line.unanswered.clear()

    def _record(self, sent: _Sent, outcome: str, head: AnswerHead | None = None) -> None:
        """Add a call to the trace, with its outcome and the times from its answer."""
        begin, end = sent.event.begin, time.monotonic_ns()
        event = sent.event._replace(end=end, outcome=TRACE_OUTCOMES.index(outcome))
        if head is not None:
            queued, computed = 1000 * head.queued_us, 1000 * head.computed_us
            # Assume that both directions took the same time.
            arrived = begin + max(end - begin - queued - computed, 0) // 2
            start = min(arrived + queued, end)
            done = min(start + computed, end)
            event = event._replace(arrived=arrived, compute_begin=start, compute_end=done)
        self._state.record(event)

    def run(self, rows: HostRows) -> tuple[np.ndarray, np.ndarray]:
        """See `HostCallServer.run`."""
        entered, spec = time.monotonic_ns(), self._spec
        self._rows = rows = rows._replace(
            x=spec.wire.round(rows.x), weight=spec.wire.round(rows.weight)
        )
        self._tables, self._parts = self._state.tables, []
        table = self._tables[0]
        known_tk = (rows.expert >= 0) & (rows.expert < spec.experts)
        failed_t = rows.valid & ~known_tk.all(1)
        known_tk &= rows.valid[:, None]
        local_tk = known_tk & table.own[rows.layer][np.where(known_tk, rows.expert, 0)]
        self._adopt()
        # Read late answers to earlier calls, so that servers that have caught up are called again.
        self._exchange(0)
        first = self._place(np.flatnonzero(known_tk & ~local_tk), 0, table.version, 0)
        away = [part.rows for part in first if part.peer not in (-1, spec.rank)]
        if away:
            self._state.count_away(rows.layer, len(np.unique(np.concatenate(away))))
        begin = time.monotonic_ns()
        if local_tk.any():
            local = self._new_part(spec.rank, np.flatnonzero(local_tk), 0)
            self._compute_here(local)
            first.insert(0, local)
        computed = time.monotonic_ns()
        self._wait(first)
        end = time.monotonic_ns()
        waited_s = 1e-9 * (end - computed)
        self._state.sum(layers=1, local_s=1e-9 * (computed - begin), waited_s=waited_s)
        y_td = np.zeros(rows.x.shape, np.float32)
        for part in first:
            self._add(part, y_td, failed_t)
        event = TraceEvent(
            kind=TRACE_KINDS.index("layer"),
            begin=entered,
            compute_begin=begin,
            compute_end=computed,
            end=end,
            step=self._state.step,
            device=self._device,
            layer=rows.layer,
            rows=len(rows.x),
        )
        self._state.record(event)
        return y_td, failed_t

    def _add(self, part: _Part, y_td: np.ndarray, failed_t: np.ndarray) -> None:
        """Add the sums of a part to `y_td`, and mark its rows in `failed_t` if it failed."""
        if part.instead and not part.answered:
            for each in part.instead:
                self._add(each, y_td, failed_t)
            return
        for each in part.rest:
            self._add(each, y_td, failed_t)
        if part.state != "done":
            failed_t[part.rows] = True
            self._count_failed(part)
        elif part.sums is not None:
            y_td[part.rows] += part.sums

    def _count_failed(self, part: _Part) -> None:
        """Count failed rows for every server that holds a missing expert."""
        rows, holders = self._rows, self._tables[0].holders[self._rows.layer]
        for _, places in itertools.groupby(part.places.tolist(), lambda place: place // rows.k):
            mask = functools.reduce(int.__or__, (holders[rows.expert.flat[p]] for p in places))
            for peer in range(self._spec.servers):
                if mask >> peer & 1:
                    self._state.count(peer, failed_rows=1)

    def _holders(self, places: np.ndarray, asked: int, version: int) -> list[int]:
        """Servers that can be called for each assignment, as bitmasks.

        Args:
            asked: bitmask of servers to exclude.
            version: the newest table up to this version is used first. If no server in that table
                can be called, older tables are used, then newer ones, nearest first.
        """
        usable = self._usable() & ~asked
        older = [table for table in self._tables if table.version <= version]
        tables = (*reversed(older), *self._tables[len(older) :])
        holders = [table.holders[self._rows.layer] for table in tables]
        return [
            next((own[expert] & usable for own in holders if own[expert] & usable), 0)
            for expert in self._rows.expert.flat[places].tolist()
        ]

    def _usable(self) -> int:
        """Bitmask of the servers that may be called, including this one."""
        if self._state.cancelled:
            return 0
        lines = self._lines.items()
        others = [peer for peer, line in lines if not line.channel.closed and not line.suspect]
        return sum(1 << peer for peer in (self._spec.rank, *others))

    def _place(self, places: np.ndarray, asked: int, version: int, patience_ns: int) -> list[_Part]:
        """Create parts for these assignments, and send or compute them.

        Args:
            asked, version: see `_holders`.
            patience_ns: ns for which assignments that no server can compute wait for a new table,
                in state "nowhere".
        """
        k, by_peer = self._rows.k, collections.defaultdict[int, list[int]](list)
        masks = iter(self._holders(places, asked, version))
        for _, group in itertools.groupby(places.tolist(), lambda place: place // k):
            row = [*group]
            chosen = choose(tuple(itertools.islice(masks, len(row))), self._spec.order)
            for place, peer in zip(row, chosen, strict=True):
                by_peer[peer].append(place)
        placed = []
        for peer, theirs in sorted(by_peer.items()):
            goes = peer not in (-1, self._spec.rank)
            for own in self._groups(np.array(theirs)) if goes else [np.array(theirs)]:
                part = self._new_part(peer, own, asked)
                placed.append(part)
                if goes:
                    self._send(part)
                elif peer >= 0:
                    self._compute_here(part)
                else:
                    part.state = "nowhere" if patience_ns > 0 else "failed"
                    part.fail_at = time.monotonic_ns() + patience_ns
        self._parts += placed
        return placed

    def _new_part(self, peer: int, places: np.ndarray, asked: int) -> _Part:
        return _Part(peer, places, np.unique(places // self._rows.k), self._tables, asked)

    def _groups(self, places: np.ndarray) -> list[np.ndarray]:
        """Split the assignments for a server into groups of whole rows.

        While the server computes one group, other groups and answers are on the wire.
        """
        starts = np.flatnonzero(np.diff(places // self._rows.k, prepend=-1))
        least = _GROUP_BYTES // self._spec.wire.bytes + 1
        most = max(-(-len(starts) // MOST_GROUPS), least)
        return np.split(places, starts[most::most])

    def _compute_here(self, part: _Part) -> None:
        """Compute a part's experts on this server; place the missing ones elsewhere.

        The part may come from a table that is not yet in force here.
        """
        rows = self._rows
        own_tk = np.zeros(rows.expert.shape, bool)
        own_tk.flat[part.places] = True
        own_nk = own_tk[part.rows]
        expert_nk = np.where(own_nk, rows.expert[part.rows], -1)
        x_nd, weight_nk = rows.x[part.rows], rows.weight[part.rows]
        part.sums, here_nk = self._state.compute(rows.layer, x_nd, expert_nk, weight_nk)
        self._replace(part, part.places[~here_nk[own_nk]], self._tables[0].version, _PATIENCE_NS)

    def _send(self, part: _Part) -> None:
        """Send a part's call, or postpone it if its server has too many unanswered calls."""
        rows, spec, line = self._rows, self._spec, self._lines[part.peer]
        wire, count = spec.wire, len(part.rows)
        head = CallHead(rows.layer, next(self._ids), self._state.step, count, len(part.places))
        size = head.form.size + head.body_bytes(wire) + 4 * wire.d * count
        queued = size + sum(sent.event.bytes for sent in line.unanswered.values())
        now, expected_s = time.monotonic_ns(), line.pace.expected(queued)
        part.repeat_at = now + int(1e9 * max(spec.repeat_s, _LATE * expected_s))
        part.fail_at = now + int(1e9 * max(spec.fail_s, _FAILED * expected_s))
        if line.full:
            return
        part.id = head.id
        _, pairs_n = np.unique(part.places // rows.k, return_counts=True)
        message = pack(
            head,
            pairs_n.astype(np.uint8).tobytes(),
            rows.expert.flat[part.places].astype(wire.number).tobytes(),
            rows.weight.flat[part.places].astype(wire.weight).tobytes(),
            wire.encode(rows.x[part.rows]),
        )
        event = TraceEvent(
            kind=TRACE_KINDS.index("call"),
            begin=now,
            step=head.step,
            id=head.id,
            device=self._device,
            layer=head.layer,
            peer=part.peer,
            rows=count,
            bytes=size,
        )
        line.unanswered[head.id] = _Sent(event, queued)
        self._state.count_call(part.peer, rows.layer, count, len(message))
        line.channel.send(message)

    def _wait(self, first: Sequence[_Part]) -> None:
        while True:
            now = time.monotonic_ns()
            for part in self._parts:
                self._review(part, now)
            if all(part.resolved for part in first):
                return
            self._state.progress += 1
            self._exchange(self._next_look())
            self._adopt()

    def _next_look(self) -> int:
        """Time in ns at which the parts must be reviewed again."""
        now = time.monotonic_ns()
        times = [now + _LOOK_SELDOM_NS]
        for part in self._parts:
            if part.state == "nowhere":
                times.append(now + _LOOK_NS)
            elif part.state == "waiting":
                times.append(part.fail_at if part.repeated else part.repeat_at)
        return min(times)

    def _review(self, part: _Part, now: int) -> None:
        if part.state not in ("waiting", "nowhere"):
            return
        if self._state.cancelled:
            part.state = "failed"
        elif part.state == "waiting":
            self._review_waiting(part, self._lines[part.peer], now)
        elif self._state.tables is not part.tables:
            self._replace(part, part.places, self._tables[0].version, part.fail_at - now)
        elif now >= part.fail_at:
            part.state = "failed"

    def _review_waiting(self, part: _Part, line: _Line, now: int) -> None:
        if line.channel.closed:
            self._forget(line)
        if line.channel.closed or (not part.id and line.suspect):
            # The server may never come back: do not wait for its answer.
            self._lose(part)
        elif now >= part.fail_at:
            line.suspect = True
            if part.id in line.unanswered:
                self._record(line.unanswered[part.id], "late")
            part.state = "lost" if part.instead else "failed"
        elif not part.id:
            if not line.full:
                self._send(part)
        elif now >= part.repeat_at and not part.repeated:
            self._repeat(part)

    def _replace(self, part: _Part, missing: np.ndarray, version: int, patience_ns: int) -> None:
        """Mark a part as done, and request its `missing` assignments from other servers."""
        part.state = "done"
        if not len(missing):
            return
        self._tables = self._state.tables
        # After state "nowhere", try all servers again: any of them may hold the experts by now.
        asked = part.asked | 1 << part.peer if part.peer >= 0 else 0
        part.rest = self._place(missing, asked, version, patience_ns)

    def _lose(self, part: _Part) -> None:
        """Handle a part whose answer will never arrive."""
        if part.id:
            self._state.count(part.peer, lost=1)
        if part.instead:
            part.state = "lost"
        else:
            self._replace(part, part.places, self._tables[0].version, 0)

    def _repeat(self, part: _Part) -> None:
        """Call other servers too, if other servers hold all experts of the part."""
        part.repeated = True
        self._lines[part.peer].suspect = True
        asked, version = part.asked | 1 << part.peer, self._tables[0].version
        if all(self._holders(part.places, asked, version)):
            self._state.count(part.peer, repeats=1)
            part.instead = self._place(part.places, asked, version, 0)

    def _exchange(self, until: int) -> None:
        """Send and read what is possible, waiting until time `until` (ns) if nothing is."""
        owing = {line.channel: peer for peer, line in self._lines.items() if line.unanswered}
        for channel in poll(owing, 1e-9 * (until - time.monotonic_ns())):
            for head, body in channel.read(AnswerHead, self._spec.wire, self._spec.most_rows):
                self._answered(owing[channel], head, body)

    def _answered(self, peer: int, head: AnswerHead, body: memoryview) -> None:
        line = self._lines[peer]
        sent = line.unanswered.pop(head.id, None)
        if sent is None:
            return
        waited_ns = time.monotonic_ns() - sent.event.begin
        size = head.form.size + len(body)
        self._state.count(peer, waited_ns=waited_ns, bytes_received=size)
        if head.status == DONE:
            line.pace.learn(sent.queued, 1e-9 * waited_ns)
            b, s = sent.queued, 1e-9 * waited_ns - 1e-6 * (head.queued_us + head.computed_us)
            self._state.sum(moved=Moved(1, s, b, b * b, b * s, s * s))
        self._record(sent, "answered" if head.whole else "refused", head)
        line.suspect = line.suspect and bool(line.unanswered)
        for part in self._parts:
            if part.id == head.id and part.peer == peer and part.state == "waiting":
                self._take_answer(part, head, body)
                return

    def _take_answer(self, part: _Part, head: AnswerHead, body: memoryview) -> None:
        missing = part.places
        if head.status == DONE and head.rows == len(part.rows):
            numbers = head.rows * self._spec.wire.d
            part.sums = np.frombuffer(body, "<f4", numbers).reshape(head.rows, -1)
            gone = np.frombuffer(body, "<u2", offset=4 * numbers)
            missing = missing[np.isin(self._rows.expert.flat[missing], gone)]
        if len(missing):
            self._state.count(part.peer, refusals=1)
        self._replace(part, missing, head.version, _PATIENCE_NS)
