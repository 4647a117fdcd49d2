"""Which servers of a service run, and how lost ones come back.

For servers that step on their own: the others serve on while one is gone. The launcher alone
decides who is present, and tells all others.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Callable, Sequence
from typing import Protocol

#: Seconds before a lost server is started again, after so many failed starts; the last one for all
#: further ones.
BACK_OFF_S = (0.0, 0.5, 1.0, 2.0, 3.0)
#: Failed starts of every server in a row after which the service gives up.
MAX_FAILED_STARTS = 5
#: Seconds for a front end that was started again to call back.
CALL_TIMEOUT_S = 60.0
#: Seconds between two questions whether a server is there; unanswered ones after which it is gone.
ASK_S, UNANSWERED = 1.0, 3


class Actions(Protocol):
    """What the members need of the service."""

    def start_engine(self, rank: int, number: int) -> None:
        """Have a running front end start its engine."""
        ...

    def start_front(self, rank: int, number: int) -> bool:
        """Start a server's front end with its engine; returns False if that is not possible yet."""
        ...

    def end_front(self, rank: int) -> None:
        """End a front end that does not call back."""
        ...

    def left(self, rank: int) -> None:
        """A server is no longer present."""
        ...

    def came(self, rank: int) -> None:
        """A server is present again: connect all servers to it."""
        ...

    def heard(self, rank: int) -> int:
        """Ask whether a server's front end is there; the number returned grows by its answer."""
        ...

    def notice(self, name: str, text: str) -> None:
        """Pass a message to the operator."""
        ...


class _State(enum.Enum):
    """What a server's processes do."""

    #: The engine serves.
    RUNS = enum.auto()
    #: The engine starts; the front end runs.
    STARTS = enum.auto()
    #: The front end starts, and with it the engine.
    FRONT_STARTS = enum.auto()
    #: The engine, or the front end with it, waits to be started again.
    ENGINE_DEAD = enum.auto()
    FRONT_DEAD = enum.auto()
    #: There is no server.
    VACANT = enum.auto()


@dataclasses.dataclass
class Member:
    """One server."""

    state: _State = _State.RUNS
    #: Number of the engine's latest start.
    start: int = 0
    #: Starts in a row that failed, and why the server ended last.
    failures: int = 0
    why: str = ""
    #: When it is started again, or when it was started.
    at: float = 0.0
    #: It does not answer, though its processes may run.
    silent: bool = False
    #: Its engine gives no sign of life.
    hung: bool = False
    #: Frames heard from it, and questions since then.
    heard: int = 0
    unanswered: int = 0

    @property
    def present(self) -> bool:
        """Whether other servers may count on it."""
        return self.state is _State.RUNS and not (self.silent or self.hung)

    @property
    def gone(self) -> bool:
        """Whether the whole server is gone, not only its engine."""
        return self.silent or self.state in (_State.FRONT_DEAD, _State.FRONT_STARTS)


class AllFailed(Exception):
    """Every server fails again and again; `rank` is one of them."""

    def __init__(self, rank: int, why: str) -> None:
        super().__init__(rank, why)
        self.rank, self.why = rank, why


class Members:
    """The servers of a service.

    Args:
        names: of the servers, by rank, "" for vacant seats; all servers run. The service changes
            the names as servers join and leave.
        actions: starts processes and tells the servers.
        clock: monotonic time in seconds.
    """

    def __init__(
        self, names: Sequence[str], actions: Actions, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._names, self._actions, self._clock = names, actions, clock
        self._members = [Member(_State.RUNS if name else _State.VACANT) for name in names]
        self._asked = clock()
        #: Grows whenever a server is present no longer, or again.
        self.epoch = 1

    def _left(self, rank: int) -> None:
        self.epoch += 1
        self._actions.left(rank)

    def _came(self, rank: int) -> None:
        self.epoch += 1
        self._actions.came(rank)

    @property
    def _seated(self) -> list[Member]:
        return [member for member in self._members if member.state is not _State.VACANT]

    def join(self, rank: int) -> None:
        """A server takes a vacant seat: start it."""
        start = self._members[rank].start
        self._members[rank] = Member(_State.FRONT_DEAD, start, at=self._clock())

    def leave(self, rank: int) -> None:
        """A server has left for good."""
        was_present = self._members[rank].present
        self._members[rank] = Member(_State.VACANT, self._members[rank].start)
        if was_present:
            self._left(rank)

    def await_call(self, rank: int) -> None:
        """A front end runs, but whether its engine does is known only once it calls back."""
        member = self._members[rank]
        member.state, member.at = _State.FRONT_STARTS, self._clock()

    def __getitem__(self, rank: int) -> Member:
        return self._members[rank]

    @property
    def present(self) -> frozenset[int]:
        """Ranks of the servers that others may count on."""
        return frozenset(rank for rank, member in enumerate(self._members) if member.present)

    @property
    def gone(self) -> frozenset[int]:
        """Ranks of the servers that are gone with their front ends."""
        return frozenset(rank for rank, member in enumerate(self._members) if member.gone)

    def engine_died(self, rank: int, why: str) -> None:
        """A server's engine has ended; its front end runs."""
        if self._members[rank].state in (_State.FRONT_DEAD, _State.FRONT_STARTS):
            return  # the front end died as well, and takes its engine along
        what = f"{why.partition(chr(10))[0]}; it restarts, requests in flight wait"
        self._died(rank, _State.ENGINE_DEAD, why, what)

    def front_died(self, rank: int, why: str) -> None:
        """A server's front end has ended, and its engine with it."""
        what = f"{why.partition(chr(10))[0]}; it is started again, the others serve on"
        self._died(rank, _State.FRONT_DEAD, why, what)

    def engine_silent(self, rank: int, silent: bool) -> None:
        """A running engine gives no sign of life for the moment, or does so again."""
        member = self._members[rank]
        was_present, member.hung = member.present, silent
        if was_present and not member.present:
            self._actions.notice(
                self._names[rank], "its engine gives no sign of life; the others serve on"
            )
            self._left(rank)
        elif member.present and not was_present:
            self._actions.notice(self._names[rank], "its engine goes on")
            self._came(rank)

    def _died(self, rank: int, state: _State, why: str, what: str) -> None:
        member = self._members[rank]
        started = member.state in (_State.STARTS, _State.FRONT_STARTS)
        member.failures = member.failures + 1 if started else 0
        delay = BACK_OFF_S[min(member.failures, len(BACK_OFF_S) - 1)]
        was_present = member.present
        # A host that is away for long fails in the same way every few seconds.
        told = state is _State.FRONT_DEAD and why == member.why and member.failures > 0
        member.state, member.at, member.why = state, self._clock() + delay, why
        member.silent, member.hung, member.unanswered = False, False, 0
        if not told:
            self._actions.notice(self._names[rank], what)
        if was_present:
            self._left(rank)
        if all(each.failures >= MAX_FAILED_STARTS for each in self._seated):
            raise AllFailed(rank, why)

    def ready(self, rank: int) -> None:
        """A server's engine is ready."""
        member = self._members[rank]
        if member.state is _State.RUNS:
            return
        member.state, member.failures = _State.RUNS, 0
        if member.present:
            self._came(rank)
        if len(self.present) == len(self._seated):
            self._actions.notice("", "all engines are running again")

    def called(self, rank: int, start: int = 0) -> None:
        """A front end that was started, or taken over, has called back.

        Args:
            rank: of the server.
            start: number of its engine's start, if the front end was taken over.
        """
        member = self._members[rank]
        member.start = max(member.start, start)
        if member.state is _State.FRONT_STARTS:
            member.state = _State.STARTS

    def tick(self, fronts: bool) -> None:
        """Start what is due, and notice servers that do not answer; call this often.

        Args:
            fronts: front ends may be started.
        """
        now = self._clock()
        for rank, member in enumerate(self._members):
            if member.state is _State.ENGINE_DEAD and now >= member.at:
                member.start, member.state, member.at = member.start + 1, _State.STARTS, now
                self._actions.start_engine(rank, member.start)
            elif member.state is _State.FRONT_DEAD and now >= member.at and fronts:
                if self._actions.start_front(rank, member.start + 1):
                    member.start, member.state, member.at = (
                        member.start + 1,
                        _State.FRONT_STARTS,
                        now,
                    )
            elif member.state is _State.FRONT_STARTS and now > member.at + CALL_TIMEOUT_S:
                self._actions.end_front(rank)
                member.at = now
        if now - self._asked >= ASK_S:
            self._asked = now
            self._ask()

    def _ask(self) -> None:
        for rank, member in enumerate(self._members):
            if member.state is not _State.RUNS:  # a front end that starts is busy
                continue
            heard = self._actions.heard(rank)
            member.unanswered = member.unanswered + 1 if heard == member.heard else 0
            member.heard = heard
            if member.unanswered >= UNANSWERED and not member.silent:
                was_present, member.silent = member.present, True
                self._actions.notice(
                    self._names[rank],
                    f"does not answer for {UNANSWERED * ASK_S:g} s; the others serve on",
                )
                if was_present:
                    self._left(rank)
            elif member.unanswered == 0 and member.silent:
                member.silent = False
                self._actions.notice(self._names[rank], "answers again")
                if member.present:
                    self._came(rank)
