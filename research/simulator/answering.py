"""How servers answer calls: in the paper's system (`Devices`), and in this engine (`Answering`)."""

from __future__ import annotations

import collections
import math
from typing import TYPE_CHECKING, Protocol

from research.simulator.calls import Call, Group, Line

if TYPE_CHECKING:
    from research.simulator.independent import Servers

#: A call is late after REPEAT_S seconds or LATE times the expected time, whichever is more; as in
#: native/caller.cc.
REPEAT_S, LATE = 0.2, 3
#: Rows that waiting calls may have to be computed at once, as in native/answerer.cc.
MOST_ROWS = 1024


class Callees(Protocol):
    """Servers that answer calls."""

    def call(self, group: Group, now: float) -> None:
        """Sends a group's calls."""
        ...

    def wait(self, group: Group, now: float) -> None:
        """Notes that the group's server waits for the answers from now on."""
        ...


class Devices:
    """The paper's system: devices compute each call on its own, in order of arrival."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers

    def call(self, group: Group, now: float) -> None:
        for call in group.calls:
            self._servers.at(self._servers.ask(call, now), self._compute, call)

    def wait(self, group: Group, now: float) -> None:
        pass

    def _compute(self, now: float, call: Call) -> None:
        jobs = self._servers.answering(call.server, [call])
        self._servers.at(self._servers.compute(call.server, now, jobs), self._answer, call)

    def _answer(self, now: float, call: Call) -> None:
        self._servers.answered(call, self._servers.answer(call, now))


class Answering:
    """This engine: one thread of each server answers calls, all that wait for the same layer at
    once, and a caller repeats a late call to other holders."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        num = len(servers.batches)
        model = servers.scenario.model
        self._row = model.row_bytes + model.reply_bytes
        self._lines: dict[tuple[int, int], Line] = collections.defaultdict(Line)
        #: For each caller, servers that owe a late answer: not called until they have answered all.
        self._suspects: list[set[int]] = [set() for _ in range(num)]
        #: For each caller, the group that it waits for, and when it looks for late calls of it.
        self._groups: list[Group | None] = [None] * num
        self._looks = [math.inf] * num
        #: For each server, calls that wait for its thread, and whether the thread is computing.
        self._waiting: list[list[Call]] = [[] for _ in range(num)]
        self._busy = [False] * num

    def call(self, group: Group, now: float) -> None:
        if suspects := self._suspects[group.server]:
            instead = self._servers.planner.instead
            group.calls = [
                each
                for call in group.calls
                for each in (call.server in suspects and instead(call, suspects)) or [call]
            ]
        for call in group.calls:
            self._send(call, now)

    def wait(self, group: Group, now: float) -> None:
        server = group.server
        self._groups[server] = group
        late = min([call.late for call in group.calls if call.over > now], default=math.inf)
        if late < self._looks[server]:
            self._looks[server] = late = max(late, now)
            self._servers.at(late, self._look, server)

    def _look(self, now: float, server: int) -> None:
        """Repeats the late calls of the group that a server waits for."""
        group = self._groups[server]
        if group is None or now != self._looks[server]:
            return
        self._looks[server] = math.inf
        if group.waits:
            for call in group.calls:
                if call.over > now >= call.late:
                    self._repeat(call, now)
            self.wait(group, now)

    def _repeat(self, call: Call, now: float) -> None:
        call.late = math.inf
        suspects = self._suspects[call.group.server]
        suspects.add(call.server)
        call.instead = self._servers.planner.instead(call, suspects)
        self._servers.work[call.group.server].repeats += bool(call.instead)
        for each in call.instead:
            each.instead_of = call
            self._send(each, now)

    def _send(self, call: Call, now: float) -> None:
        line = call.line = self._lines[call.group.server, call.server]
        line.calls += 1
        line.size += call.rows * self._row
        call.queued = line.size
        call.late = now + max(REPEAT_S, LATE * line.expected(call.queued))
        self._servers.at(self._servers.ask(call, now), self._come, call)

    def _come(self, now: float, call: Call) -> None:
        """Queues a call that has arrived."""
        self._waiting[call.server].append(call)
        if not self._busy[call.server]:
            self._answer_next(now, call.server)

    def _answer_next(self, now: float, server: int) -> None:
        """Computes the call that has waited longest, and with it others for the same layer."""
        waiting = self._waiting[server]
        self._busy[server] = bool(waiting)
        if not waiting:
            return
        taken, left, rows = [], [], 0
        for call in waiting:
            fits = not taken or rows + call.rows <= MOST_ROWS
            if call.layer == waiting[0].layer and fits:
                rows += call.rows
                taken.append(call)
            else:
                left.append(call)
        self._waiting[server] = left
        jobs = self._servers.answering(server, taken)
        self._servers.at(self._servers.compute(server, now, jobs), self._answer, taken)

    def _answer(self, now: float, calls: list[Call]) -> None:
        for call in calls:
            self._take(call, self._servers.answer(call, now))
        self._answer_next(now, calls[0].server)

    def _take(self, call: Call, when: float) -> None:
        """Notes that the answer to a call arrives at `when`."""
        line = call.line
        assert line is not None
        line.calls -= 1
        line.size -= call.rows * self._row
        line.learn(call.queued, when - call.sent)
        if not line.calls:
            self._suspects[call.group.server].discard(call.server)
        first = call.instead_of
        if first is None:
            self._servers.answered(call, when)
            return
        call.over = when
        whole = max(each.over for each in first.instead)
        if whole < first.over:
            self._servers.answered(first, whole)
