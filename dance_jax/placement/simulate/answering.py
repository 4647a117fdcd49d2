"""What becomes of calls: in the paper's system (`Devices`), and in this engine (`Answering`)."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import TYPE_CHECKING, Protocol

from dance_jax.placement.simulate.calls import Call, Group

if TYPE_CHECKING:
    from dance_jax.placement.simulate.independent import Servers

# These are native/caller.cc's.

#: A call is late after so many seconds, or so many times what it was expected to take; more times
#: than the last number no answer counts for.
REPEAT_S, LATE, FAILED = 0.2, 3, 10
#: Weight of the latest answer in a pace; bytes up to which an answer is a small one.
LEARN, SMALL = 0.2, 8192
#: And native/answerer.cc's: rows that are computed in one go, where calls wait together.
MOST_TOGETHER = 1024


class Callees(Protocol):
    """What becomes of calls."""

    def call(self, group: Group, now: float) -> None:
        """Sends a group's calls."""
        ...

    def wait(self, group: Group, now: float) -> None:
        """From now on its server waits for their answers."""
        ...


class Devices:
    """Calls are computed as they come, each on its own: the paper's system."""

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


@dataclasses.dataclass(slots=True)
class Line:
    """What a server knows of another that it calls."""

    #: Calls without an answer, and their bytes.
    calls: int = 0
    size: int = 0
    #: How long its answers take: seconds of small ones, and of each byte.
    base_s: float = 0.02
    byte_s: float = 1e-6

    def expected(self, size: int) -> float:
        """Seconds until an answer comes."""
        return self.base_s + self.byte_s * size

    def learn(self, size: int, seconds: float) -> None:
        """An answer has come."""
        seconds = min(seconds, FAILED * self.expected(size))
        if size <= SMALL:
            self.base_s += LEARN * (seconds - self.base_s)
        else:
            self.byte_s += LEARN * (max(0.0, seconds - self.base_s) / size - self.byte_s)


class Answering:
    """One thread of each server answers calls, those that wait for the same layer in one go; who
    waits for a late answer asks other holders too: this engine."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        num = len(servers.batches)
        model = servers.scenario.model
        self._row = model.row_bytes + model.reply_bytes
        self._lines: dict[tuple[int, int], Line] = collections.defaultdict(Line)
        #: Of each caller: servers that are not asked until they have answered everything.
        self._suspects: list[set[int]] = [set() for _ in range(num)]
        #: Of each server: calls that wait for its thread, and whether that is computing.
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
        late = min([call.late for call in group.calls])
        self._servers.at(max(late, now), self._look, group)

    def _look(self, now: float, group: Group) -> None:
        """Repeats what is late."""
        if not group.waits:
            return
        for call in group.calls:
            if call.over > now >= call.late:
                self._repeat(call, now)
        late = min([call.late for call in group.calls if call.over > now], default=math.inf)
        if late < math.inf:
            self._servers.at(late, self._look, group)

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
        line = self._lines[call.group.server, call.server]
        line.calls += 1
        line.size += call.rows * self._row
        call.queued = line.size
        call.late = now + max(REPEAT_S, LATE * line.expected(call.queued))
        self._servers.at(self._servers.ask(call, now), self._come, call)

    def _come(self, now: float, call: Call) -> None:
        """A call has come."""
        self._waiting[call.server].append(call)
        if not self._busy[call.server]:
            self._answer_next(now, call.server)

    def _answer_next(self, now: float, server: int) -> None:
        """The call that has waited longest, and with it those for the same layer."""
        waiting = self._waiting[server]
        self._busy[server] = bool(waiting)
        if not waiting:
            return
        taken, left, rows = [], [], 0
        for call in waiting:
            rows += call.rows
            fits = not taken or rows <= MOST_TOGETHER
            (taken if call.layer == waiting[0].layer and fits else left).append(call)
        self._waiting[server] = left
        jobs = self._servers.answering(server, taken)
        self._servers.at(self._servers.compute(server, now, jobs), self._answer, taken)

    def _answer(self, now: float, calls: list[Call]) -> None:
        for call in calls:
            self._take(call, self._servers.answer(call, now))
        self._answer_next(now, calls[0].server)

    def _take(self, call: Call, when: float) -> None:
        """An answer that comes then."""
        line = self._lines[call.group.server, call.server]
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
