"""One device's expert calls in Python; native/caller.cc says why it does what it does."""

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

# These are caller.cc's.

#: A call is late after so many times what it was expected to take, and fails after so many.
_LATE, _FAILED = 3, 10
#: ns that a row waits for a table by which somebody has what others have refused.
_PATIENCE_NS = 500_000_000
#: ns between two looks at it, and at new connections.
_LOOK_NS, _LOOK_SELDOM_NS = 5_000_000, 100_000_000
#: Weight of the latest answer in a pace; bytes up to which an answer is a small one.
_LEARN, _SMALL = 0.2, 8192
#: Bytes of rows that are worth a call of their own where there are more.
_GROUP_BYTES = 64 * 1024
#: Bits of a call's number beside the device.
_CALL_BITS = 48


class HostRows(NamedTuple):
    """A layer's rows of one device, on the host."""

    #: Which of the layers with routed experts it is.
    layer: int
    #: float32 [t, d].
    x: np.ndarray
    #: int32 [t, k] and float32 [t, k].
    expert: np.ndarray
    weight: np.ndarray
    #: bool [t], False for rows that are routed nowhere.
    valid: np.ndarray

    @property
    def k(self) -> int:
        return self.expert.shape[1]


@functools.lru_cache(maxsize=1 << 16)
def choose(holders: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """The server that computes each of a row's experts, by the rule of placement/visit.py.

    Args:
        holders: a bit mask of servers for each expert.
        order: all servers in the order in which the caller prefers to call them.

    Returns:
        A server for each expert; -1 if no server holds it.
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
    """How long a peer's answers take."""

    def __init__(self) -> None:
        self._base_s, self._byte_s = 0.02, 1e-6

    def expected(self, size: int) -> float:
        """Seconds."""
        return self._base_s + self._byte_s * size

    def learn(self, size: int, s: float) -> None:
        # A server that stopped once is not slow from then on.
        s = min(s, _FAILED * self.expected(size))
        if size <= _SMALL:
            self._base_s += _LEARN * (s - self._base_s)
        else:
            self._byte_s += _LEARN * (max(0.0, s - self._base_s) / size - self._byte_s)


class _Sent(NamedTuple):
    """A call that was sent."""

    #: As the trace has it until there is an answer.
    event: TraceEvent
    #: Its bytes, there and back, with those of the calls before it that were not answered.
    queued: int


@dataclasses.dataclass
class _Line:
    """A peer that is called."""

    channel: CallChannel
    pace: _Pace
    #: Calls that it owes an answer, by their ids.
    unanswered: dict[int, _Sent] = dataclasses.field(default_factory=dict)
    #: An answer is late: it is asked no more until all that it owes have come.
    suspect: bool = False

    @property
    def full(self) -> bool:
        return len(self.unanswered) >= MOST_UNANSWERED


@dataclasses.dataclass
class _Part:
    """What is asked of one server."""

    #: -1: nobody has it.
    peer: int
    #: The assignments, as places t * k + i in `HostRows.expert`, ascending; and their rows.
    places: np.ndarray
    rows: np.ndarray
    #: By which it was placed.
    tables: tuple[Table, ...]
    #: Who was asked for the same before, a bitmask.
    asked: int
    #: Done: its sums are those of all its experts but for what `rest` asks others for.
    state: Literal["waiting", "done", "lost", "nowhere", "failed"] = "waiting"
    #: 0: it is not sent yet.
    id: int = 0
    #: ns.
    repeat_at: int = 0
    fail_at: int = 0
    repeated: bool = False
    #: float32 [rows, d]; None: nothing of it was there.
    sums: np.ndarray | None = None
    rest: Sequence[_Part] = ()
    #: Parts that ask others for the same, as this one is late.
    instead: Sequence[_Part] = ()

    @property
    def answered(self) -> bool:
        """By its own server, and by those that `rest` asks."""
        return self.state == "done" and all(part.succeeded for part in self.rest)

    @property
    def succeeded(self) -> bool:
        return self.answered or (
            bool(self.instead) and all(part.succeeded for part in self.instead)
        )

    @property
    def resolved(self) -> bool:
        """There is no more to wait for."""
        if self.state == "failed" or self.succeeded:
            return True
        others = (*self.rest, *self.instead)
        return self.state in ("done", "lost") and all(part.resolved for part in others)


class HostCaller:
    """The calls of one device's steps. One thread at a time runs a layer."""

    def __init__(self, state: HostState, device: int) -> None:
        self._state, self._spec, self._device = state, state.spec, device
        #: Of the peers that were dialled, by rank.
        self._lines: dict[int, _Line] = {}
        self._lock = threading.Lock()
        self._dialled: list[tuple[int, socket.socket]] = []
        # No two devices' calls have the same number.
        self._ids = itertools.count(1 + (device << _CALL_BITS))
        #: Of the layer that runs.
        self._parts: list[_Part] = []
        self._tables = state.tables

    def dial(self, peer: int, connection: socket.socket) -> None:
        """Takes over a connection to a peer, in place of the one before; from any thread."""
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
            # What the old connection took along is lost.
            for part in self._parts:
                if part.state == "waiting" and part.id and part.peer == peer:
                    self._lose(part)

    def _forget(self, line: _Line) -> None:
        """Its connection has ended, and with it what was not answered."""
        for sent in line.unanswered.values():
            self._record(sent, "lost")
        line.unanswered.clear()

    def _record(self, sent: _Sent, outcome: str, head: AnswerHead | None = None) -> None:
        """What became of a call, and when its answer says it was where."""
        begin, end = sent.event.begin, time.monotonic_ns()
        event = sent.event._replace(end=end, outcome=TRACE_OUTCOMES.index(outcome))
        if head is not None:
            queued, computed = 1000 * head.queued_us, 1000 * head.computed_us
            # As if both ways took the same time.
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
        # Late answers to earlier calls: whoever has sent all of them is asked again.
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
        """Adds what was answered, and the rows for which nobody answered."""
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
        """Rows that failed, at all servers that hold what they lack."""
        rows, holders = self._rows, self._tables[0].holders[self._rows.layer]
        for _, places in itertools.groupby(part.places.tolist(), lambda place: place // rows.k):
            mask = functools.reduce(int.__or__, (holders[rows.expert.flat[p]] for p in places))
            for peer in range(self._spec.servers):
                if mask >> peer & 1:
                    self._state.count(peer, failed_rows=1)

    def _holders(self, places: np.ndarray, asked: int, version: int) -> list[int]:
        """Of each assignment the servers to ask, a bitmask without those in `asked`: by the newest
        table that is no newer than a version, or else by the others, the next ones first."""
        usable = self._usable() & ~asked
        older = [table for table in self._tables if table.version <= version]
        tables = (*reversed(older), *self._tables[len(older) :])
        holders = [table.holders[self._rows.layer] for table in tables]
        return [
            next((own[expert] & usable for own in holders if own[expert] & usable), 0)
            for expert in self._rows.expert.flat[places].tolist()
        ]

    def _usable(self) -> int:
        """Servers that may be asked, this one among them; a bitmask."""
        if self._state.cancelled:
            return 0
        lines = self._lines.items()
        others = [peer for peer, line in lines if not line.channel.closed and not line.suspect]
        return sum(1 << peer for peer in (self._spec.rank, *others))

    def _place(self, places: np.ndarray, asked: int, version: int, patience_ns: int) -> list[_Part]:
        """Parts for these assignments, which are sent, or computed here. What nobody has is
        "nowhere" until so many ns have passed.

        Args:
            asked, version: see `_holders`.
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
        """A server's assignments in groups of whole rows. While it computes one, others are on the
        wire, both ways."""
        starts = np.flatnonzero(np.diff(places // self._rows.k, prepend=-1))
        least = _GROUP_BYTES // self._spec.wire.bytes + 1
        most = max(-(-len(starts) // MOST_GROUPS), least)
        return np.split(places, starts[most::most])

    def _compute_here(self, part: _Part) -> None:
        """What the table in force has here, or one that is not in force here yet."""
        rows = self._rows
        own_tk = np.zeros(rows.expert.shape, bool)
        own_tk.flat[part.places] = True
        own_nk = own_tk[part.rows]
        expert_nk = np.where(own_nk, rows.expert[part.rows], -1)
        x_nd, weight_nk = rows.x[part.rows], rows.weight[part.rows]
        part.sums, here_nk = self._state.compute(rows.layer, x_nd, expert_nk, weight_nk)
        self._replace(part, part.places[~here_nk[own_nk]], self._tables[0].version, _PATIENCE_NS)

    def _send(self, part: _Part) -> None:
        """Sends a part, or leaves it for when its server has answered another."""
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
            self._exchange(self._next_look())
            self._adopt()

    def _next_look(self) -> int:
        """When a wait has to look at its parts again."""
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
            # Nobody is waited for who may never come back.
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
        """A part has its answer, its sums, but for these assignments, which go to others."""
        part.state = "done"
        if not len(missing):
            return
        self._tables = self._state.tables
        # When nobody was left, any server may have got them since.
        asked = part.asked | 1 << part.peer if part.peer >= 0 else 0
        part.rest = self._place(missing, asked, version, patience_ns)

    def _lose(self, part: _Part) -> None:
        """A part gets no answer."""
        if part.id:
            self._state.count(part.peer, lost=1)
        if part.instead:
            part.state = "lost"
        else:
            self._replace(part, part.places, self._tables[0].version, 0)

    def _repeat(self, part: _Part) -> None:
        """Asks others too, where all that is wanted has other holders."""
        part.repeated = True
        self._lines[part.peer].suspect = True
        asked, version = part.asked | 1 << part.peer, self._tables[0].version
        if all(self._holders(part.places, asked, version)):
            self._state.count(part.peer, repeats=1)
            part.instead = self._place(part.places, asked, version, 0)

    def _exchange(self, until: int) -> None:
        """Sends and reads what it can; where that is nothing, waits for it until then."""
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
