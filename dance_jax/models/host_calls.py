"""Expert calls by the host: for servers with accelerators, or without the C++ library.

The protocol is that of native/wire.h, so that servers of both forms are in one cluster. The host
drives the parts of a step (engine/step.py): it takes a layer's rows from the devices, asks other
servers for the experts that are not here, has the devices compute those that are, and waits for
its own answers alone. One thread answers the others' calls, whatever the step does; it makes no
call, so no two servers can wait for each other.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dance_jax.models.call_messages import (
    ANSWER,
    ANSWER_KIND,
    ANSWER_MAGIC,
    CALL,
    CALL_KIND,
    CALL_MAGIC,
    DONE,
    NOT_HERE,
    Channel,
    Wire,
    poll,
)
from dance_jax.models.calls import (
    FAIL_S,
    REPEAT_S,
    TRACE_EVENTS,
    TRACE_KINDS,
    TRACE_OUTCOMES,
    TraceEvent,
)
from dance_jax.models.counters import Counters, Moved, PeerCounters, Sums
from dance_jax.placement.visit import EXACT_SERVERS

#: A call is late after so many times what it was expected to take, and fails after so many.
_LATE, _FAILED = 3, 10
#: Seconds that a row waits for a table by which somebody has what others have refused; seconds
#: between two looks at it, and at new connections.
_PATIENCE_S, _LOOK_S, _LOOK_SELDOM_S = 0.5, 0.005, 0.1
#: Bits of a call's number beside the device.
_CALL_BITS = 48
#: Weight of the latest answer in a pace; bytes up to which an answer is a small one.
_LEARN, _SMALL = 0.2, 8192

#: Groups of a layer's rows that go to a server one by one, each as a call; bytes of rows that are
#: worth a call of their own where there are more.
MOST_GROUPS, _GROUP_BYTES = 4, 64 * 1024
#: Calls of one caller that a callee has not answered: one of each group, and a repeat of another's.
MOST_UNANSWERED = MOST_GROUPS + 1

#: Computes experts that are here: (x float32 [n, d], experts int [n, k] by their numbers in the
#: model or -1, weights float32 [n, k]) -> (sums float32 [n, d], bool [n, k], False where an expert
#: is not here). Any thread calls it.
Compute = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class HostRows(NamedTuple):
    """A layer's rows, on the host."""

    #: Which of the layers with routed experts it is.
    layer: int
    #: float32 [t, d].
    x: np.ndarray
    #: int32 [t, k] and float32 [t, k].
    expert: np.ndarray
    weight: np.ndarray
    #: bool [t], False for rows that are routed nowhere.
    valid: np.ndarray


@functools.lru_cache(maxsize=1 << 16)
def choose(holders: tuple[int, ...], servers: int) -> tuple[int, ...]:
    """The server that is asked for each of a row's experts, as placement/visit.py has it.

    Args:
        holders: of each expert, a bitmask.

    Returns:
        -1 where nobody holds the expert.
    """
    chosen = _fewest([mask for mask in holders if mask], servers)
    return tuple((mask & chosen & -(mask & chosen)).bit_length() - 1 for mask in holders)


def _fewest(holders: Sequence[int], servers: int) -> int:
    if servers <= EXACT_SERVERS:
        sets = (
            sum(1 << n for n in each)
            for size in range(servers + 1)
            for each in itertools.combinations(range(servers), size)
        )
        return next(each for each in sets if all(mask & each for mask in holders))
    chosen = 0
    while unmet := [mask for mask in holders if not mask & chosen]:
        chosen |= 1 << max(range(servers), key=lambda n: sum(mask >> n & 1 for mask in unmet))
    return chosen


class _Table:
    """Who holds which expert, by one version of the placement."""

    def __init__(self, version: int, resident_nle: np.ndarray) -> None:
        self.version = version
        bytes_lew = np.packbits(resident_nle, axis=0, bitorder="little").transpose(1, 2, 0)
        #: Bitmasks of servers, by layer and expert.
        self.holders = [
            [int.from_bytes(servers.tobytes(), "little") for servers in experts]
            for experts in bytes_lew
        ]


class _Pace:
    """How long a peer's answers take."""

    def __init__(self) -> None:
        self._base_s, self._byte_s = 0.02, 1e-6

    def expected(self, size: int) -> float:
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

    at: float
    #: Bytes with those of the calls before it that were not answered.
    queued: int
    #: There and back.
    bytes: int
    step: int
    layer: int
    rows: int


@dataclasses.dataclass
class _Line:
    """A peer that is called."""

    channel: Channel | None = None
    #: Calls that it owes an answer, by their ids.
    unanswered: dict[int, _Sent] = dataclasses.field(default_factory=dict)
    #: An answer is late: it is asked no more until all that it owes have come.
    suspect: bool = False
    pace: _Pace = dataclasses.field(default_factory=_Pace)

    @property
    def usable(self) -> bool:
        return self.channel is not None and not self.channel.closed and not self.suspect


@dataclasses.dataclass
class _Part:
    """What is asked of one server: assignments, as places t * k + i in `HostRows.expert`, in order;
    and the rows that they are of."""

    peer: int
    places: np.ndarray
    rows: np.ndarray
    #: The tables by which it was placed; and who was asked for the same before.
    tables: tuple[_Table, ...]
    asked: int
    #: Or done (its sums are those of all its experts but for what `rest` asks others for), nowhere,
    #: lost, failed.
    state: str = "waiting"
    #: 0: it is not sent yet.
    id: int = 0
    repeat_at: float = 0.0
    fail_at: float = 0.0
    repeated: bool = False
    #: float32 [rows, d].
    sums: np.ndarray | None = None
    rest: Sequence[_Part] = ()
    #: Parts that ask others for the same, as this one is late.
    instead: Sequence[_Part] = ()

    @property
    def succeeded(self) -> bool:
        if self.state == "done" and all(part.succeeded for part in self.rest):
            return True
        return bool(self.instead) and all(part.succeeded for part in self.instead)

    @property
    def resolved(self) -> bool:
        """There is no more to wait for."""
        if self.state == "failed" or self.succeeded:
            return True
        others = (*self.rest, *self.instead)
        return self.state in ("done", "lost") and all(part.resolved for part in others)

    def add(self, y_td: np.ndarray, failed_t: np.ndarray) -> list[_Part]:
        """Adds what was answered; the parts that were not, whose rows have failed."""
        own = self.state == "done" and self.succeeded
        others = self.rest if own or not self.instead else self.instead
        failed = [part for each in others for part in each.add(y_td, failed_t)]
        if self.instead and not own:
            return failed
        if self.state != "done":
            failed_t[self.rows] = True
            failed.append(self)
        elif self.sums is not None:
            y_td[self.rows] += self.sums
        return failed


class HostCallServer:
    """The `ExpertCalls` that the host does itself.

    Args:
        rank: this server's, of so many `servers`.
        layers: with routed experts, of so many `experts` each.
        wire: type in which hidden states travel, of `d` values.
        most_rows: of a call.
        k: experts of a row at most.
        devices: of this server.
        compute: the experts that are here.
        repeat_s, fail_s: see calls.REPEAT_S.
    """

    def __init__(
        self,
        rank: int,
        servers: int,
        layers: int,
        experts: int,
        wire: Wire,
        most_rows: int,
        k: int,
        devices: int,
        compute: Compute,
        repeat_s: float = REPEAT_S,
        fail_s: float = FAIL_S,
    ) -> None:
        self.rank, self.servers, self.layers, self.experts = rank, servers, layers, experts
        self.wire, self.most_rows, self.k, self.compute = wire, most_rows, k, compute
        #: The one in force, then those of batches that are staged, in their order.
        self.tables = (_Table(0, np.zeros((servers, layers, experts), bool)),)
        self.cancelled = False
        self._lock = threading.Lock()
        #: What was counted, under the lock.
        self._peers = [PeerCounters() for _ in range(servers)]
        self._rows = np.zeros((layers, servers), np.int64)
        self._sums = Sums()
        #: Of the steps that begin.
        self.step = 0
        #: Events of a trace, most of them and how many were lost; most is 0 where nobody wants one.
        self._events: list[TraceEvent] = []
        self._most_events = self._lost_events = 0
        #: Of each device.
        self.callers = [_Caller(self, device, repeat_s, fail_s) for device in range(devices)]
        self._threads = concurrent.futures.ThreadPoolExecutor(devices, "caller")
        self._answerer = _Answerer(self)

    def use(self, version: int, resident_nle: np.ndarray) -> None:
        staged = (table for table in self.tables if table.version > version)
        self.tables = (self._new_table(version, resident_nle), *staged)

    def stage(self, version: int, resident_nle: np.ndarray) -> None:
        self.tables = (*self.tables, self._new_table(version, resident_nle))

    def drop(self, version: int) -> None:
        in_force, *staged = self.tables
        self.tables = (in_force, *(table for table in staged if table.version < version))

    def cancel(self) -> None:
        self.cancelled = True

    def _new_table(self, version: int, resident_nle: np.ndarray) -> _Table:
        if resident_nle.shape != (self.servers, self.layers, self.experts):
            raise ValueError(f"a placement of shape {resident_nle.shape}")
        return _Table(version, resident_nle)

    def dial(self, device: int, peer: int, connection: socket.socket) -> None:
        self.callers[device].dial(peer, connection)

    def accept(self, peer: int, connection: socket.socket) -> None:
        self._answerer.accept(peer, connection)

    def run(self, rows: Sequence[HostRows]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Weighted sums of the experts of each device's rows, wherever they are; one thread at a
        time.

        Returns:
            Of each device float32 [t, d]; and bool [t], the rows that have failed, as nobody
            answered for them.
        """
        if len(rows) == 1:
            return [self.callers[0].run(rows[0])]
        return list(self._threads.map(_Caller.run, self.callers, rows))

    def numbers(self, layer: int, expert: np.ndarray) -> np.ndarray:
        """The experts' numbers in the model, -1 where there is none."""
        return np.where(expert >= 0, layer * self.experts + expert, -1)

    def count(self, peer: int, **more: int) -> None:
        """Adds to `calls.PeerCounters`."""
        with self._lock:
            for name, value in more.items():
                setattr(self._peers[peer], name, getattr(self._peers[peer], name) + value)

    def count_call(self, peer: int, layer: int, rows: int, size: int) -> None:
        """A call of so many rows and bytes has been sent."""
        self.count(peer, calls=1, rows=rows, bytes_sent=size)
        with self._lock:
            self._rows[layer, peer] += rows

    def sum(self, **more: float) -> None:
        """Adds to `calls.Sums`."""
        with self._lock:
            for name, value in more.items():
                setattr(self._sums, name, getattr(self._sums, name) + value)

    def add_moved(self, more: Moved) -> None:
        """Adds to `Sums.moved`."""
        with self._lock:
            self._sums.moved += more

    def counters(self) -> Counters:
        with self._lock:
            peers = tuple(dataclasses.replace(each) for each in self._peers)
            return Counters(peers, self._rows.copy(), dataclasses.replace(self._sums))

    def begin_step(self, step: int) -> None:
        self.step = step

    def start_trace(self, most: int = TRACE_EVENTS) -> None:
        self._most_events = most

    def take_trace(self) -> tuple[list[TraceEvent], int]:
        with self._lock:
            taken = self._events, self._lost_events
            self._events, self._lost_events = [], 0
        return taken

    def record(self, kind: str, outcome: str, times: Mapping[str, float], **fields: int) -> None:
        """Adds to the trace, if there is one.

        Args:
            times: in seconds.
        """
        if not self._most_events:
            return
        fields |= {name: int(1e9 * s) for name, s in times.items()}
        fields |= {"kind": TRACE_KINDS.index(kind), "outcome": TRACE_OUTCOMES.index(outcome)}
        event = TraceEvent(**(dict.fromkeys(TraceEvent._fields, 0) | fields))
        with self._lock:
            if len(self._events) < self._most_events:
                self._events.append(event)
            else:
                self._lost_events += 1

    def close(self) -> None:
        self._answerer.close()
        self._threads.shutdown()
        for caller in self.callers:
            caller.close()


class _Caller:
    """The calls of one device's steps; caller.cc says why it does what it does."""

    def __init__(self, server: HostCallServer, device: int, repeat_s: float, fail_s: float) -> None:
        self._server, self._repeat_s, self._fail_s = server, repeat_s, fail_s
        self._device = device
        self._lines = [_Line() for _ in range(server.servers)]
        self._lock = threading.Lock()
        self._dialled: list[tuple[int, socket.socket]] = []
        # No two devices' calls have the same number.
        self._ids = itertools.count(1 + (device << _CALL_BITS))
        #: Of the layer that runs.
        self._parts: list[_Part] = []
        self._tables = server.tables

    def dial(self, peer: int, connection: socket.socket) -> None:
        with self._lock:
            self._dialled.append((peer, connection))

    def close(self) -> None:
        self._adopt()
        for line in self._lines:
            if line.channel is not None:
                line.channel.close()

    def _adopt(self) -> None:
        with self._lock:
            dialled, self._dialled = self._dialled, []
        for peer, connection in dialled:
            line = self._lines[peer]
            self._forget(peer)
            if line.channel is not None:
                line.channel.close()
            self._lines[peer] = _Line(Channel(connection), pace=line.pace)
            # What the old connection took along is lost.
            for part in [*self._parts]:
                if part.state == "waiting" and part.id and part.peer == peer:
                    self._lose(part)

    def _forget(self, peer: int) -> None:
        """The connection took along what was to be answered."""
        unanswered = self._lines[peer].unanswered
        for number, sent in unanswered.items():
            self._record(peer, number, sent, "lost")
        unanswered.clear()

    def _record(
        self, peer: int, number: int, sent: _Sent, outcome: str, queued_s=0.0, computed_s=0.0
    ) -> None:
        now = time.monotonic()
        times = {"begin": sent.at, "end": now}
        if outcome in ("answered", "refused"):
            # As if both ways took the same time.
            arrived = sent.at + max(now - sent.at - queued_s - computed_s, 0) / 2
            began = min(arrived + queued_s, now)
            times |= {"arrived": arrived, "compute_begin": began}
            times["compute_end"] = min(began + computed_s, now)
        fields = sent._asdict() | {"id": number, "peer": peer, "device": self._device}
        del fields["at"], fields["queued"]
        self._server.record("call", outcome, times, **fields)

    def run(self, rows: HostRows) -> tuple[np.ndarray, np.ndarray]:
        server, entered = self._server, time.monotonic()
        self._layer_rows, self._tables, self._parts = rows, server.tables, []
        self._x = server.wire.round(rows.x)
        holders, version = self._tables[0].holders[rows.layer], self._tables[0].version
        valid_tk = np.broadcast_to(rows.valid[:, None], rows.expert.shape)
        used = np.unique(rows.expert[valid_tk])
        here = [e for e in used.tolist() if holders[e] >> server.rank & 1]
        local_tk = valid_tk & np.isin(rows.expert, here)
        failed_t = np.zeros(len(rows.x), bool)
        self._adopt()
        # Late answers to earlier calls: whoever has sent all of them is asked again.
        self._exchange(0.0)
        first = self._place(np.flatnonzero(valid_tk & ~local_tk), 0, version, 0.0)
        begin = time.monotonic()
        y_td = np.zeros(rows.x.shape, np.float32)
        if local_tk.any():
            numbers_tk = server.numbers(rows.layer, np.where(local_tk, rows.expert, -1))
            sums_td, here_tk = server.compute(self._x, numbers_tk, rows.weight)
            y_td += sums_td
            # Where a table names what is not here, others may have it.
            first += self._place(np.flatnonzero(~here_tk), 1 << server.rank, version, 0.0)
        computed = time.monotonic()
        self._wait(first)
        end = time.monotonic()
        server.sum(layers=1, local_s=computed - begin, waited_s=end - computed)
        for part in first:
            for failed in part.add(y_td, failed_t):
                self._count_failed(failed)
        times = {"begin": entered, "end": end, "compute_begin": begin, "compute_end": computed}
        fields = {"step": server.step, "device": self._device, "layer": rows.layer}
        server.record("layer", "answered", times, rows=len(rows.x), **fields)
        return y_td, failed_t

    def _count_failed(self, part: _Part) -> None:
        """Rows that failed, at all servers that hold what they lack."""
        rows, holders = self._layer_rows, self._tables[0].holders[self._layer_rows.layer]
        k = rows.expert.shape[1]
        for _, places in itertools.groupby(part.places.tolist(), lambda place: place // k):
            mask = 0
            for place in places:
                mask |= holders[rows.expert.flat[place]]
            for peer in range(self._server.servers):
                if mask >> peer & 1:
                    self._server.count(peer, failed_rows=1)

    def _usable(self) -> int:
        """Servers that may be asked, this one among them; a bitmask."""
        if self._server.cancelled:
            return 0
        others = sum(1 << n for n, line in enumerate(self._lines) if line.usable)
        return others | 1 << self._server.rank

    def _holders(self, usable: int, version: int) -> Callable[[int], int]:
        """Those of some servers to ask for an expert: by the newest table that is no newer than a
        version, or else by the others, the next ones first."""
        older = [table for table in self._tables if table.version <= version]
        tables = (*reversed(older), *self._tables[len(older) :])
        holders = [table.holders[self._layer_rows.layer] for table in tables]

        def find(expert: int) -> int:
            return next((mask for own in holders if (mask := own[expert] & usable)), 0)

        return find

    def _place(
        self, places: np.ndarray, asked: int, version: int, patience_s: float
    ) -> list[_Part]:
        """Parts for these assignments, which are sent, or computed here; none to servers in
        `asked`, a bitmask. What nobody has is "nowhere" until so many seconds have passed.

        Args:
            version: see `_holders`.
        """
        if not len(places):
            return []
        rows, server = self._layer_rows, self._server
        holders = self._holders(self._usable() & ~asked, version)
        k = rows.expert.shape[1]
        by_peer: dict[int, list[int]] = collections.defaultdict(list)
        for _, group in itertools.groupby(places.tolist(), lambda place: place // k):
            own = list(group)
            masks = tuple(holders(int(rows.expert.flat[place])) for place in own)
            for place, peer in zip(own, choose(masks, server.servers), strict=True):
                by_peer[peer].append(place)
        placed = []
        for peer, own in sorted(by_peer.items()):
            goes = peer >= 0 and peer != server.rank
            for at in self._groups(np.array(own), k) if goes else [np.array(own)]:
                part = _Part(peer, at, np.unique(at // k), self._tables, asked)
                placed.append(part)
                if goes:
                    self._send(part)
                elif peer >= 0:
                    self._compute_here(part)
                else:
                    part.state = "nowhere" if patience_s > 0 else "failed"
                    part.fail_at = time.monotonic() + patience_s
        self._parts += placed
        return placed

    def _groups(self, places: np.ndarray, k: int) -> list[np.ndarray]:
        """A server's assignments in groups of whole rows. While it computes one, others are on the
        wire, both ways."""
        starts = np.flatnonzero(np.diff(places // k, prepend=-1))
        least = _GROUP_BYTES // self._server.wire.bytes + 1
        most = max(-(-len(starts) // MOST_GROUPS), least)
        return np.split(places, starts[most::most])

    def _compute_here(self, part: _Part) -> None:
        """By a table that is not in force here yet."""
        rows, server = self._layer_rows, self._server
        own_tk = np.zeros(rows.expert.shape, bool)
        own_tk.flat[part.places] = True
        own_nk = own_tk[part.rows]
        numbers_nk = server.numbers(rows.layer, np.where(own_nk, rows.expert[part.rows], -1))
        part.sums, here_nk = server.compute(self._x[part.rows], numbers_nk, rows.weight[part.rows])
        missing = part.places[~here_nk[own_nk]]
        self._replace(part, missing, self._tables[0].version, _PATIENCE_S)

    def _send(self, part: _Part) -> None:
        """Sends a part, or leaves it for when its server has answered another."""
        rows, wire = self._layer_rows, self._server.wire
        line = self._lines[part.peer]
        size = CALL.size + len(part.rows) * (1 + wire.bytes + 4 * wire.d) + 6 * len(part.places)
        queued = size + sum(sent.bytes for sent in line.unanswered.values())
        now, expected_s = time.monotonic(), line.pace.expected(queued)
        part.repeat_at = now + max(self._repeat_s, _LATE * expected_s)
        part.fail_at = now + max(self._fail_s, _FAILED * expected_s)
        if len(line.unanswered) >= MOST_UNANSWERED:
            return
        part.id = next(self._ids)
        of_row = part.places // rows.expert.shape[1]
        counts = np.bincount(np.searchsorted(part.rows, of_row), minlength=len(part.rows))
        step, counted = self._server.step, (len(part.rows), len(part.places))
        head = (CALL_MAGIC, CALL_KIND, rows.layer, part.id, step, *counted)
        message = b"".join(
            [
                CALL.pack(*head),
                counts.astype(np.uint8).tobytes(),
                rows.expert.flat[part.places].astype("<u2").tobytes(),
                rows.weight.flat[part.places].astype("<f4").tobytes(),
                wire.encode(self._x[part.rows]),
            ]
        )
        line.unanswered[part.id] = _Sent(now, queued, size, step, rows.layer, len(part.rows))
        assert line.channel is not None
        line.channel.send(message)
        self._server.count_call(part.peer, rows.layer, len(part.rows), len(message))

    def _wait(self, first: Sequence[_Part]) -> None:
        while True:
            now = time.monotonic()
            for part in [*self._parts]:
                self._review(part, now)
            if all(part.resolved for part in first):
                return
            self._exchange(self._next_look(now) - now)
            self._adopt()

    def _next_look(self, now: float) -> float:
        times = [now + _LOOK_SELDOM_S]
        for part in self._parts:
            if part.state == "nowhere":
                times.append(now + _LOOK_S)
            elif part.state == "waiting":
                times.append(part.fail_at if part.repeated else part.repeat_at)
        return min(times)

    def _review(self, part: _Part, now: float) -> None:
        if self._server.cancelled and part.state in ("waiting", "nowhere"):
            part.state = "failed"
        elif part.state == "waiting":
            line = self._lines[part.peer]
            gone = line.channel is None or line.channel.closed
            if gone:
                self._forget(part.peer)
            if gone or (not part.id and line.suspect):
                self._lose(part)
            elif now >= part.fail_at:
                line.suspect = True
                if part.id in line.unanswered:
                    self._record(part.peer, part.id, line.unanswered[part.id], "late")
                part.state = "lost" if part.instead else "failed"
            elif not part.id:
                if len(line.unanswered) < MOST_UNANSWERED:
                    self._send(part)
            elif now >= part.repeat_at and not part.repeated:
                self._repeat(part)
        elif part.state == "nowhere":
            if self._server.tables is not part.tables:
                self._replace(part, part.places, self._tables[0].version, part.fail_at - now)
            elif now >= part.fail_at:
                part.state = "failed"

    def _replace(self, part: _Part, missing: np.ndarray, version: int, patience_s: float) -> None:
        """A part has its answer, its sums, but for these assignments, which go to others."""
        part.state = "done"
        self._tables = self._server.tables
        # When nobody was left, any server may have got them since.
        asked = part.asked | 1 << part.peer if part.peer >= 0 else 0
        part.rest = self._place(missing, asked, version, patience_s)

    def _lose(self, part: _Part) -> None:
        """A part gets no answer."""
        if part.id:
            self._server.count(part.peer, lost=1)
        if part.instead:
            part.state = "lost"
        else:
            self._replace(part, part.places, self._tables[0].version, 0.0)

    def _repeat(self, part: _Part) -> None:
        """Asks others too, where all that is wanted has other holders."""
        part.repeated = True
        self._lines[part.peer].suspect = True
        asked, version = part.asked | 1 << part.peer, self._tables[0].version
        holders = self._holders(self._usable() & ~asked, version)
        wanted = np.unique(self._layer_rows.expert.flat[part.places]).tolist()
        if all(holders(expert) for expert in wanted):
            self._server.count(part.peer, repeats=1)
            part.instead = self._place(part.places, asked, version, 0.0)

    def _exchange(self, timeout_s: float) -> None:
        """Sends and reads what it can; where that is nothing, waits so long for it."""
        owing = {
            line.channel: peer
            for peer, line in enumerate(self._lines)
            if line.channel is not None and line.unanswered
        }
        if not owing and timeout_s <= 0:
            return
        for channel in poll(owing, timeout_s):
            for message in channel.read(ANSWER, self._answer_bytes):
                self._answered(owing[channel], message)

    def _answer_bytes(self, magic: int, kind: int, *rest: int) -> int:
        rows, missing = rest[3], rest[6]
        sane = rows <= self._server.most_rows and missing <= 1 << 16
        if (magic, kind) != (ANSWER_MAGIC, ANSWER_KIND) or not sane:
            raise ValueError
        return 4 * self._server.wire.d * rows + 2 * missing

    def _answered(self, peer: int, message: bytes) -> None:
        head = ANSWER.unpack_from(message)
        _, _, status, number, version, rows, queued_us, computed_us, gone = head
        line = self._lines[peer]
        if number not in line.unanswered:
            return
        sent = line.unanswered.pop(number)
        waited, size = time.monotonic() - sent.at, sent.queued
        callee_s = 1e-6 * queued_us, 1e-6 * computed_us
        whole = status == DONE and not gone
        self._record(peer, number, sent, "answered" if whole else "refused", *callee_s)
        count = {"waited_ns": int(1e9 * waited), "bytes_received": len(message)}
        self._server.count(peer, **count)
        if status == DONE:
            line.pace.learn(size, waited)
            s = waited - sum(callee_s)
            self._server.add_moved(Moved(1, s, size, size * size, size * s, s * s))
        line.suspect = line.suspect and bool(line.unanswered)
        for part in self._parts:
            if part.id == number and part.peer == peer and part.state == "waiting":
                missing = part.places
                if status == DONE and rows == len(part.rows):
                    numbers = rows * self._server.wire.d
                    sums = np.frombuffer(message, np.float32, numbers, ANSWER.size)
                    part.sums = sums.reshape(rows, -1)
                    gone = np.frombuffer(message, "<u2", offset=ANSWER.size + 4 * numbers)
                    missing = missing[np.isin(self._layer_rows.expert.flat[missing], gone)]
                self._server.count(peer, refusals=len(missing) > 0)
                self._replace(part, missing, version, _PATIENCE_S)
                return


class _Call(NamedTuple):
    """A call that waits for its turn."""

    peer: int
    channel: Channel
    arrived: float
    #: Of the model's layers with routed experts.
    layer: int
    id: int
    #: Of the caller.
    step: int
    bytes: int
    #: float32 [n, d], int [n, k] with -1 for none, float32 [n, k]; None: it is none of this model.
    content: tuple[np.ndarray, np.ndarray, np.ndarray] | None

    @property
    def rows(self) -> int:
        return 0 if self.content is None else len(self.content[0])


class _Answerer:
    """Answers the others' calls, in a thread of its own."""

    def __init__(self, server: HostCallServer) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._accepted: list[tuple[int, socket.socket]] = []
        self._ends = False
        self._wake, woken = socket.socketpair()
        self._woken = Channel(woken)
        self._lines: dict[Channel, int] = {}
        self._calls: list[_Call] = []
        self._thread = threading.Thread(target=self._serve, daemon=True, name="answerer")
        self._thread.start()

    def accept(self, peer: int, connection: socket.socket) -> None:
        with self._lock:
            self._accepted.append((peer, connection))
        self._wake.send(b"\0")

    def close(self) -> None:
        self._ends = True
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")
        self._thread.join()
        self._wake.close()
        for channel in (self._woken, *self._lines):
            channel.close()
        for _, connection in self._accepted:
            connection.close()

    def _serve(self) -> None:
        one = struct.Struct("B")
        while not self._ends:
            with self._lock:
                accepted, self._accepted = self._accepted, []
            for peer, connection in accepted:
                self._lines[Channel(connection)] = peer
            readable = poll([self._woken, *self._lines], 0.0 if self._calls else None)
            for channel in readable:
                if channel is self._woken:
                    collections.deque(channel.read(one, lambda _: 0), maxlen=0)
                    continue
                self._receive(channel)
            if self._calls:
                self._answer_next()
            self._resume()
            for channel in [each for each in self._lines if each.closed]:
                del self._lines[channel]
                channel.close()

    def _receive(self, channel: Channel) -> None:
        """Takes calls from a connection; what it sends beyond MOST_UNANSWERED waits there."""
        for message in channel.read(CALL, self._body_bytes):
            self._calls.append(self._read(self._lines[channel], channel, message))
            channel.paused = self._full(channel)
            if channel.paused:
                return

    def _full(self, channel: Channel) -> bool:
        waiting = sum(call.channel is channel for call in self._calls)
        return waiting >= MOST_UNANSWERED or channel.sending

    def _resume(self) -> None:
        """Reads on where calls have been answered."""
        for channel in self._lines:
            if channel.paused and not channel.closed:
                channel.paused = self._full(channel)
                if not channel.paused and channel.buffered:
                    self._receive(channel)

    def _body_bytes(self, magic: int, kind: int, *rest: int) -> int:
        *_, rows, pairs = rest
        sane = rows <= self._server.most_rows and pairs <= rows * self._server.k
        if (magic, kind) != (CALL_MAGIC, CALL_KIND) or not sane:
            raise ValueError
        return rows * (1 + self._server.wire.bytes) + 6 * pairs

    def _read(self, peer: int, channel: Channel, message: bytes) -> _Call:
        server = self._server
        _, _, layer, number, step, rows, pairs = CALL.unpack_from(message)
        body = memoryview(message)[CALL.size :]
        counts = np.frombuffer(body, np.uint8, rows).astype(np.int64)
        experts = np.frombuffer(body, "<u2", pairs, rows).astype(np.int64)
        weights = np.frombuffer(body, "<f4", pairs, rows + 2 * pairs)
        content = None
        sane = layer < server.layers and counts.sum() == pairs and (counts <= server.k).all()
        if sane and (experts < server.experts).all():
            expert_nk = np.full((rows, server.k), -1)
            weight_nk = np.zeros((rows, server.k), np.float32)
            there_nk = np.arange(server.k) < counts[:, None]
            expert_nk[there_nk], weight_nk[there_nk] = experts, weights
            x_nd = server.wire.decode(body[rows + 6 * pairs :])
            content = x_nd, server.numbers(layer, expert_nk), weight_nk
        return _Call(peer, channel, time.monotonic(), layer, number, step, len(message), content)

    def _answer_next(self) -> None:
        """Answers the call that has waited longest, and with it those for the same layer."""
        together: list[_Call] = []
        left: list[_Call] = []
        rows, begin = 0, time.monotonic()
        for call in self._calls:
            fits = not together or rows + call.rows <= self._server.most_rows
            if call.layer == self._calls[0].layer and fits:
                together.append(call)
                rows += call.rows
            else:
                left.append(call)
        self._calls = left
        parts = [call.content for call in together if call.content is not None]
        sums_nd = np.zeros((0, self._server.wire.d), np.float32)
        here_nk = np.zeros((0, self._server.k), bool)
        if rows:
            x_nd, expert_nk, weight_nk = map(np.concatenate, zip(*parts, strict=True))
            sums_nd, here_nk = self._server.compute(x_nd, expert_nk, weight_nk)
        end, at = time.monotonic(), 0
        self._server.sum(served_s=end - begin, served_batches=rows > 0)
        for call in together:
            own = slice(at, at + call.rows)
            at = own.stop
            sums, gone = None, np.zeros(0, int)
            if call.content is not None:
                wanted_nk = call.content[1]
                gone = wanted_nk[~here_nk[own]]
                if not len(gone) or len(gone) < (wanted_nk >= 0).sum():
                    sums = sums_nd[own]
            missing = np.unique(gone) - call.layer * self._server.experts
            self._answer(call, sums, missing, begin, end)
            times = {"begin": call.arrived, "arrived": call.arrived, "end": end}
            times |= {"compute_begin": begin, "compute_end": end}
            fields = {"step": call.step, "id": call.id, "layer": call.layer, "peer": call.peer}
            fields |= {"rows": call.rows, "calls": len(together)}
            whole = sums is not None and not len(missing)
            self._server.record("served", "answered" if whole else "refused", times, **fields)

    def _answer(
        self, call: _Call, sums: np.ndarray | None, missing: np.ndarray, begin: float, end: float
    ) -> None:
        """Sums but for the missing experts; None: nothing of the call is here."""
        status, rows, gone, body = NOT_HERE, 0, 0, b""
        if sums is not None:
            status, rows, gone = DONE, len(sums), len(missing)
            body = np.ascontiguousarray(sums, np.float32).tobytes()
            body += missing.astype("<u2").tobytes()
        times = int(1e6 * (begin - call.arrived)), int(1e6 * (end - begin))
        version = self._server.tables[0].version
        head = ANSWER_MAGIC, ANSWER_KIND, status, call.id, version, rows, *times, gone
        counts = {
            "answered": 1,
            "answered_rows": rows,
            "queued_ns": int(1e9 * (begin - call.arrived)),
        }
        size = {"bytes_sent": ANSWER.size + len(body), "bytes_received": call.bytes}
        self._server.count(call.peer, **counts, **size)
        call.channel.send(ANSWER.pack(*head), body)
