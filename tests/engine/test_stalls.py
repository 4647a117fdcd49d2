"""Log messages about sequences that wait for experts."""

from __future__ import annotations

from typing import Any

import pytest

from dance_jax.engine import stalls
from dance_jax.engine.stalls import QUIET_S, Stalls
from dance_jax.models.counters import PeerCounters


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stalls, "time", clock)
    return clock


def counted(*failed_rows: int) -> list[PeerCounters]:
    return [PeerCounters(failed_rows=rows) for rows in failed_rows]


def test_it_is_said_who_is_missing_and_when_all_goes_on(clock: Clock, caplog: Any) -> None:
    found = Stalls(("alpha", "beta", "gamma"))
    found.failed(counted(0, 4, 0))
    found.update(3)
    found.failed(counted(0, 8, 1))
    found.update(5)
    clock.now += 2.5
    found.update(0)
    found.update(0)
    assert caplog.messages == [
        "3 sequences wait for experts of beta, which does not answer",
        "no sequence waits for experts of beta, gamma any more, after 2.5 s",
    ]


def test_a_host_that_comes_and_goes_does_not_flood_the_log(clock: Clock, caplog: Any) -> None:
    found = Stalls(("alpha", "beta"))
    for turn in range(50):
        found.failed(counted(0, turn + 1))
        found.update(1)
        clock.now += 0.1
        found.update(0)
    assert len(caplog.messages) == 2
    # A stall that starts within QUIET_S and persists is logged once QUIET_S has passed.
    found.failed(counted(7, 50))
    found.update(2)
    assert len(caplog.messages) == 2
    clock.now += QUIET_S
    found.update(2)
    assert caplog.messages[2:] == ["2 sequences wait for experts of alpha, which does not answer"]


def test_experts_that_nobody_holds(clock: Clock, caplog: Any) -> None:
    found = Stalls(("alpha", "beta"))
    found.failed(counted(0, 0))
    found.update(1)
    assert caplog.messages == ["1 sequence waits for experts that no server holds"]
