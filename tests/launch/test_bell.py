"""Servers that rest: what wakes them, and what does not."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Iterator

import pytest
import zmq

from dance_jax.launch.worker.wakeup import Bell, hang
from dance_jax.models.connections import Identity, Key, Listener

NAMES = ("alpha", "beta", "gamma")
#: Seconds: longer than anything here takes, and a rest that is to run out.
PATIENCE_S, SHORT_S = 30.0, 0.02


@pytest.fixture
def bells() -> Iterator[list[Bell]]:
    """Of three servers, connected as in a cluster."""
    key, ranks = Key(b"k" * 32, Identity("model", "float32", "float32")), range(len(NAMES))
    with contextlib.ExitStack() as stack:
        listeners = [Listener(rank, NAMES, "127.0.0.1", key) for rank in ranks]
        for listener in listeners:
            stack.callback(listener.close)
        endpoints = [listener.endpoint for listener in listeners]
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(len(NAMES)))
        hung = pool.map(lambda rank: hang(rank, NAMES, listeners[rank], endpoints, key), ranks)
        bells = list(hung)
        for bell in bells:
            stack.callback(bell.close)
        yield bells


@pytest.fixture
def control() -> Iterator[tuple[zmq.Socket, zmq.Socket]]:
    """A server's end of its control channel, and the parent's."""
    context = zmq.Context()
    ends = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    ends[0].bind("inproc://control")
    ends[1].connect("inproc://control")
    yield ends
    context.destroy(linger=0)


def test_a_ring_wakes_all_others(bells: list[Bell], control) -> None:
    bells[1].ring(7)
    for other in (0, 2):
        assert bells[other].wait(control[0], PATIENCE_S, 7)


def test_a_ring_wakes_who_waits_already(bells: list[Bell], control) -> None:
    woken: list[bool] = []
    resting = threading.Thread(
        target=lambda: woken.append(bells[0].wait(control[0], PATIENCE_S, 3))
    )
    resting.start()
    bells[2].ring(3)
    resting.join(PATIENCE_S)
    assert woken == [True]


def test_a_ring_for_a_step_that_has_been_is_void(bells: list[Bell], control) -> None:
    """Two ring for the same step; the later ring comes after it."""
    bells[1].ring(7)
    assert bells[0].wait(control[0], PATIENCE_S, 7)
    bells[2].ring(7)
    assert not bells[0].wait(control[0], SHORT_S, 8)
    bells[2].ring(8)
    assert bells[0].wait(control[0], PATIENCE_S, 8)


def test_a_command_ends_the_rest_and_stays(bells: list[Bell], control) -> None:
    mine, parents = control
    parents.send(b"command")
    assert not bells[0].wait(mine, PATIENCE_S, 1)
    assert mine.recv(zmq.NOBLOCK) == b"command"


def test_a_rest_runs_out(bells: list[Bell], control) -> None:
    assert not bells[0].wait(control[0], SHORT_S, 1)
    assert not bells[0].wait(control[0], -1.0, 1)


def test_many_rings_at_once(bells: list[Bell], control) -> None:
    for step in range(1, 2000):
        bells[1].ring(step)
    assert bells[0].wait(control[0], PATIENCE_S, 1999)


def test_a_server_that_is_gone_is_named(bells: list[Bell], control) -> None:
    bells[1].ring(4)
    bells[1].close()
    assert bells[0].wait(control[0], PATIENCE_S, 4), "what it rang for is still begun"
    with pytest.raises(RuntimeError, match="server beta closed the connection"):
        bells[0].wait(control[0], PATIENCE_S, 5)
    with pytest.raises(RuntimeError, match="server beta closed the connection"):
        for _ in range(1000):
            bells[2].ring(5)


def test_one_server_alone_rests_too(control) -> None:
    bell = Bell(("alone",), {})
    bell.ring(1)
    assert not bell.wait(control[0], SHORT_S, 2)
