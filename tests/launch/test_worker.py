"""A server receives its parent's commands while a step waits for others; with a fake engine."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dance_jax.engine.engine import StepResult
from dance_jax.launch.control import protocol
from dance_jax.launch.worker.loading import Loader
from dance_jax.launch.worker.main import Stopped, Worker, _await_join

#: Seconds: an upper limit for waits that are expected to succeed.
LONG_S = 30.0


class Played:
    """A fake engine whose first step waits for something, and the fake channel to the parent.

    Args:
        said: commands of the parent during that step. After the step the parent sends Stop.
        over: ends the step when it returns true.
    """

    has_work = False
    trace = waterfall = None

    def __init__(self, said: Sequence[protocol.Command], over: Callable[[Played], bool]) -> None:
        self._said, self._over = said, over
        self._commands: collections.deque[protocol.Command] = collections.deque()
        #: What has happened, in order, and how often the empty channel was looked at since.
        self.happened: list[str] = []
        self.looks = 0

    def _note(self, what: str) -> None:
        self.happened.append(what)
        self.looks = 0

    # The engine.

    def step(self) -> StepResult:
        self._commands.extend(self._said)
        end = time.monotonic() + LONG_S
        while not self._over(self):
            assert time.monotonic() < end, "the step never ends"
            time.sleep(0.002)
        self._note("step")
        self._commands.append(protocol.Stop())
        return StepResult([], True)

    def cancel(self) -> None:
        self._note("cancel")

    def stage(self, number: int, *_: Any) -> None:
        self._note(f"stage {number}")

    def commit(self, number: int) -> bool:
        self._note(f"commit {number}")
        return True

    def report(self, with_counts: bool) -> None:
        return None

    # The channel.

    keeps_up = True
    pulse = None

    def waits(self, timeout_s: float = 0.0) -> bool:
        self.looks += not self._commands
        return bool(self._commands)

    def receive(self) -> protocol.Command:
        return self._commands.popleft()

    def send(self, event: protocol.Event) -> None:
        if not isinstance(event, protocol.Report):
            self._note(type(event).__name__)


def happens(said: Sequence[protocol.Command], over: Callable[[Played], bool]) -> list[str]:
    """Runs the server to its end and returns what happened. Arguments as for `Played`."""
    played: Any = Played(said, over)
    connections: Any = None
    worker = Worker(played, Loader(lambda loads: ([], 0)), connections, played)
    with pytest.raises(Stopped):
        worker.serve_alone()
    return played.happened


def stage(number: int) -> protocol.Stage:
    return protocol.Stage(number, [], [])


def test_a_stop_ends_a_step_that_waits() -> None:
    found = happens([protocol.Stop()], lambda played: "cancel" in played.happened)
    assert found[:2] == ["cancel", "step"]


def test_experts_are_staged_beside_a_step_that_waits() -> None:
    found = happens([stage(1)], lambda played: "Staged" in played.happened)
    assert found[:3] == ["stage 1", "Staged", "step"]


def test_others_may_be_lost_before_a_server_joins() -> None:
    """A server that ended because of that would have to be started once more."""
    join = protocol.Join("", ["a:1", "", "c:3"], calls=True)
    played: Any = Played([], lambda played: True)
    early = [protocol.PeerLost(1), protocol.PeerRestarted(1, "b:2"), protocol.Watched()]
    played._commands.extend([*early, join])
    assert _await_join(played) is join
    played._commands.append(protocol.Stop())
    with pytest.raises(Stopped):
        _await_join(played)


def test_a_batch_follows_the_one_before_it() -> None:
    """The first batch comes into force at the end of the step; only then are its slots free."""
    said = [protocol.Commit(1), stage(2)]
    found = happens(said, lambda played: played.looks > 3)
    assert [each for each in found if each != "cancel"][:3] == ["step", "commit 1", "Applied"]
