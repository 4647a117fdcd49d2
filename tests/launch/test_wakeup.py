"""Servers that rest: what wakes them, and what does not."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Iterator

import pytest
import zmq

from dance_jax.launch.worker.wakeup import Wakeup
from tests.connected import connected

NAMES = ("alpha", "beta", "gamma")
#: Seconds: a wait longer than any test here takes, and a rest that is meant to run out.
PATIENCE_S, SHORT_S = 30.0, 0.02


@pytest.fixture
def wakeups() -> Iterator[list[Wakeup]]:
    """The wakeups of three servers, connected as in a cluster."""
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(connected(NAMES))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(len(NAMES)))
        wakeups = list(pool.map(Wakeup, servers))
        for wakeup in wakeups:
            stack.callback(wakeup.close)
        yield wakeups


@pytest.fixture
def control() -> Iterator[tuple[zmq.Socket, zmq.Socket]]:
    """A server's end of its control channel, and the parent's end."""
    context = zmq.Context()
    ends = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    ends[0].bind("inproc://control")
    ends[1].connect("inproc://control")
    yield ends
    context.destroy(linger=0)


def test_a_ring_wakes_all_others(wakeups: list[Wakeup], control) -> None:
    wakeups[1].ring(7)
    for other in (0, 2):
        assert wakeups[other].wait(control[0], PATIENCE_S, 7)


def test_a_ring_wakes_who_waits_already(wakeups: list[Wakeup], control) -> None:
    woken: list[bool] = []
    resting = threading.Thread(
        target=lambda: woken.append(wakeups[0].wait(control[0], PATIENCE_S, 3))
    )
    resting.start()
    wakeups[2].ring(3)
    resting.join(PATIENCE_S)
    assert woken == [True]


def test_a_ring_for_a_step_that_has_been_is_void(wakeups: list[Wakeup], control) -> None:
    """Two servers ring for the same step; the second ring arrives after the step."""
    wakeups[1].ring(7)
    assert wakeups[0].wait(control[0], PATIENCE_S, 7)
    wakeups[2].ring(7)
    assert not wakeups[0].wait(control[0], SHORT_S, 8)
    wakeups[2].ring(8)
    assert wakeups[0].wait(control[0], PATIENCE_S, 8)


def test_a_command_ends_the_rest_and_stays(wakeups: list[Wakeup], control) -> None:
    mine, parents = control
    parents.send(b"command")
    assert not wakeups[0].wait(mine, PATIENCE_S, 1)
    assert mine.recv(zmq.NOBLOCK) == b"command"


def test_a_rest_runs_out(wakeups: list[Wakeup], control) -> None:
    assert not wakeups[0].wait(control[0], SHORT_S, 1)
    assert not wakeups[0].wait(control[0], -1.0, 1)


def test_many_rings_at_once(wakeups: list[Wakeup], control) -> None:
    for step in range(1, 2000):
        wakeups[1].ring(step)
    assert wakeups[0].wait(control[0], PATIENCE_S, 1999)


def test_a_server_that_is_gone_is_named(wakeups: list[Wakeup], control) -> None:
    wakeups[1].ring(4)
    wakeups[1].close()
    assert wakeups[0].wait(control[0], PATIENCE_S, 4), "what it rang for is still begun"
    with pytest.raises(RuntimeError, match="server beta closed the connection"):
        wakeups[0].wait(control[0], PATIENCE_S, 5)
    with pytest.raises(RuntimeError, match="server beta closed the connection"):
        for _ in range(1000):
            wakeups[2].ring(5)


def test_one_server_alone_rests_too(control) -> None:
    with connected(("alone",)) as (server,):
        wakeup = Wakeup(server)
    wakeup.ring(1)
    assert not wakeup.wait(control[0], SHORT_S, 2)
