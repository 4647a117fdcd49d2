"""Who is present in a service, and when lost servers are started again."""

from __future__ import annotations

import pytest

from dance_jax.launch.cluster.members import (
    ASK_S,
    BACK_OFF_S,
    CALL_TIMEOUT_S,
    MAX_FAILED_STARTS,
    UNANSWERED,
    AllFailed,
    Members,
)

NAMES = ("alpha", "beta", "gamma")


class Played:
    """Records what the members ask for; servers that are `silent` do not answer."""

    def __init__(self) -> None:
        self.now = 100.0
        self.did: list[object] = []
        self.said: list[str] = []
        self.silent: set[int] = set()
        self.possible = True
        self._heard = 0
        self.members = Members(NAMES, self, lambda: self.now)

    def start_engine(self, rank: int, number: int) -> None:
        self.did.append(("engine", rank, number))

    def start_front(self, rank: int, number: int) -> bool:
        if self.possible:
            self.did.append(("front", rank, number))
        return self.possible

    def end_front(self, rank: int) -> None:
        self.did.append(("end", rank))

    def left(self, rank: int) -> None:
        assert rank not in self.members.present
        self.did.append(("left", rank))

    def came(self, rank: int) -> None:
        assert rank in self.members.present
        self.did.append(("came", rank))

    def heard(self, rank: int) -> int:
        self._heard += 1
        return -1 if rank in self.silent else self._heard

    def notice(self, name: str, text: str) -> None:
        self.said.append(f"{name}: {text}" if name else text)

    def run(self, seconds: float) -> list[object]:
        """What the members asked for in some seconds."""
        self.did.clear()
        for _ in range(round(10 * seconds)):
            self.now += 0.1
            self.members.tick(fronts=True)
        return list(self.did)


@pytest.fixture
def played() -> Played:
    return Played()


def test_an_engine_is_started_again_at_once_then_with_pauses(played: Played) -> None:
    played.members.engine_died(1, "its engine died")
    assert played.members.present == {0, 2} and not played.members.gone
    assert played.run(0.1) == [("engine", 1, 1)]
    for number, pause in enumerate((*BACK_OFF_S[1:], BACK_OFF_S[-1]), 2):
        played.members.engine_died(1, "its engine died")
        assert played.run(pause - 0.2) == []
        assert played.run(0.3) == [("engine", 1, number)]
    played.did.clear()
    played.members.ready(1)
    assert played.did == [("came", 1)]
    assert played.said[-1] == "all engines are running again"
    played.members.engine_died(1, "its engine died")
    assert ("engine", 1, len(BACK_OFF_S) + 2) in played.run(0.1), "failures count in a row"


def test_a_front_end_is_started_again_until_it_calls(played: Played) -> None:
    played.members.front_died(2, "the host is gone")
    assert played.did == [("left", 2)]
    assert played.members.gone == {2}
    played.members.engine_died(2, "its engine died with it")
    played.possible = False
    assert played.run(3) == []
    played.possible = True
    assert played.run(0.1) == [("front", 2, 1)]
    assert played.run(CALL_TIMEOUT_S + 1) == [("end", 2)]
    played.members.front_died(2, "it was killed")
    assert ("front", 2, 2) in played.run(1)
    played.members.called(2)
    assert not played.members.gone
    played.members.ready(2)
    assert played.members.present == {0, 1, 2}


def test_a_service_that_ends_starts_no_front_end(played: Played) -> None:
    played.members.front_died(2, "the host is gone")
    played.now += 60
    played.did.clear()
    played.members.tick(fronts=False)
    assert not [each for each in played.did if isinstance(each, tuple) and each[0] == "front"]


def test_a_server_that_does_not_answer_is_lost_until_it_does(played: Played) -> None:
    played.silent = {0}
    assert ("left", 0) in played.run((UNANSWERED + 2) * ASK_S)
    assert played.members.present == {1, 2} and played.members.gone == {0}
    assert played.said == ["alpha: does not answer for 3 s; the others serve on"]
    assert played.run(30) == []
    played.silent = set()
    assert played.run(2 * ASK_S) == [("came", 0)]
    assert played.said[1:] == ["alpha: answers again"]


def test_an_engine_without_a_sign_of_life_is_done_without(played: Played) -> None:
    played.members.engine_silent(1, True)
    assert played.did == [("left", 1)] and not played.members.gone
    played.members.engine_silent(1, False)
    assert played.did == [("left", 1), ("came", 1)]
    played.members.engine_silent(1, True)
    played.did.clear()
    played.members.engine_died(1, "it hung")
    assert played.did == []
    assert played.run(0.1) == [("engine", 1, 1)]
    played.members.ready(1)
    assert played.members.present == {0, 1, 2}


def test_a_pause_of_the_launcher_makes_nobody_silent(played: Played) -> None:
    played.silent = {1}
    played.run(2 * ASK_S)
    played.now += 60
    played.members.tick(fronts=True)
    played.silent = set()
    assert played.run(5) == []


def test_it_gives_up_only_when_all_fail(played: Played) -> None:
    for rank in range(3):
        for _ in range(MAX_FAILED_STARTS):
            played.members.engine_died(rank, "no")
            played.run(6)
    with pytest.raises(AllFailed) as caught:
        for rank in range(3):
            played.members.engine_died(rank, "no")
    assert caught.value.why == "no"


def test_seats_are_left_and_taken() -> None:
    played = Played()
    played.members = Members(["alpha", "beta", ""], played, lambda: played.now)
    assert played.members.present == {0, 1}
    played.members.leave(1)
    assert played.members.present == {0} and ("left", 1) in played.did
    assert played.members.epoch == 2
    assert played.run(10.0) == []  # a vacant seat is neither asked nor started
    played.members.join(2)
    assert played.run(1.0) == [("front", 2, 1)]
    played.members.called(2)
    played.members.ready(2)
    assert played.members.present == {0, 2} and played.members.epoch == 3


def test_a_front_end_that_was_taken_over_is_waited_for() -> None:
    played = Played()
    played.members.await_call(1)
    assert played.members.present == {0, 2} and played.members.gone == {1}
    played.members.called(1, start=7)
    played.members.ready(1)
    assert played.did == [("came", 1)]
    played.members.engine_died(1, "ended")
    assert played.run(1.0) == [("engine", 1, 8)]
