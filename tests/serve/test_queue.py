"""Requests in flight across engine restarts; the fake engine is a list of the commands sent."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any
from unittest import mock

import fastapi
import pytest

from dance_jax.config import ServeOptions
from dance_jax.engine.sequence import OutputDelta, Request, SamplingParams
from dance_jax.launch.control.protocol import Abort, Command, Submit
from dance_jax.serve import queue as queue_module
from dance_jax.serve.client import client_of
from dance_jax.serve.generation import Generation
from dance_jax.serve.queue import (
    MAX_DEATHS,
    ClientQueueFull,
    QueueFull,
    RequestQueue,
    Unavailable,
)

Unread = asyncio.Queue[OutputDelta | None]


class Rig:
    """A queue whose engine has started."""

    def __init__(self, max_queue: int = 4, client_queue: int = 4) -> None:
        self.sent: list[Command] = []
        self.queue = RequestQueue(self.sent.append, max_queue, client_queue, itertools.count(1000))
        self.queue.engine_started()

    def submit(self, name: str, n: int = 1, client: str = "", **params: Any) -> Unread:
        unread: Unread = asyncio.Queue()
        request = Request(name, None, [1, 2], SamplingParams(n=n, **params), client=client)
        self.queue.submit(request, unread)
        return unread

    def bring(self, name: str, *tokens: int, index: int = 0, end: Any = None) -> None:
        self.queue.receive([OutputDelta(name, index, token_ids=list(tokens), finish_reason=end)])

    def resubmitted(self) -> dict[str, Request]:
        """The requests that a restarted engine gets."""
        self.queue.engine_died()
        self.sent.clear()
        self.queue.engine_started()
        return {
            request.request_id: request
            for command in self.sent
            if isinstance(command, Submit)
            for request in command.requests
        }


def on_loop(test: Callable[[Rig], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on an event loop, with a rig."""

    def run() -> None:
        async def on_a_loop() -> None:
            await asyncio.wait_for(test(Rig()), 30)

        asyncio.run(on_a_loop())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def drain(unread: Unread) -> list[OutputDelta]:
    found = []
    while (delta := await unread.get()) is not None:
        found.append(delta)
    return found


@on_loop
async def test_deltas_reach_their_request_until_its_end(rig: Rig) -> None:
    one, two = rig.submit("one", n=2), rig.submit("two")
    assert rig.queue.in_flight == 2
    rig.bring("one", 5)
    rig.bring("two", 6, end="stop")
    rig.bring("one", 7, index=1, end="length")
    rig.bring("one", end="length")
    found = await drain(one)
    assert [(each.index, each.token_ids) for each in found] == [(0, [5]), (1, [7]), (0, [])]
    assert [each.token_ids for each in await drain(two)] == [[6]]
    assert rig.queue.in_flight == 0
    rig.queue.abort("one")
    assert [type(command) for command in rig.sent] == [Submit, Submit], "it had ended: no Abort"


@on_loop
async def test_an_aborted_request_gives_no_more(rig: Rig) -> None:
    unread = rig.submit("one")
    rig.bring("one", 5)
    assert unread.qsize() == 1
    rig.queue.abort("one")
    assert rig.sent[-1] == Abort(["one"])
    rig.bring("one", 6, end="abort")
    assert unread.qsize() == 1 and rig.queue.in_flight == 0
    rig.queue.abort("one")
    assert len(rig.sent) == 2


@on_loop
async def test_another_engine_goes_on_from_the_tokens_so_far(rig: Rig) -> None:
    one, new = rig.submit("one", n=3, seed=7), rig.submit("new")
    rig.bring("one", 5)
    rig.bring("one", 6)
    rig.bring("one", 8, index=2, end="stop")
    again = rig.resubmitted()
    assert set(again) == {"one", "new"} and rig.queue.restarts == 1
    assert again["one"].resumed == [[5, 6], [], None]
    assert again["one"].params.seed == 7
    assert again["new"].resumed == [[]]
    rig.bring("one", 7, end="stop")
    rig.bring("one", 9, index=1, end="stop")
    assert [each.token_ids for each in await drain(one)] == [[5], [6], [8], [7], [9]]
    rig.bring("new", 1, end="stop")
    assert len(await drain(new)) == 1


@on_loop
async def test_others_have_their_turn_while_a_call_reads_what_has_piled_up(rig: Rig) -> None:
    server: Any = mock.Mock(queue=rig.queue)
    call = Generation(server, [Request("one", None, [1], SamplingParams())])
    for _ in range(9):
        rig.bring("one", 5)
    rig.bring("one", 6, end="stop")
    read, turns = asyncio.create_task(count_of(call)), 0
    while not read.done():
        await asyncio.sleep(0)
        turns += 1
    assert read.result() == 10 and turns >= 10


async def count_of(call: Generation) -> int:
    """The number of deltas that a call gets."""
    return len([delta async for delta in call.deltas()])


@on_loop
async def test_a_seed_is_drawn_once(rig: Rig) -> None:
    rig.submit("one")
    rig.submit("two")
    again = rig.resubmitted()
    assert [again[name].params.seed for name in ("one", "two")] == [1000, 1001]


@on_loop
async def test_requests_are_taken_while_engines_start_anew(rig: Rig) -> None:
    rig.queue.engine_died()
    rig.submit("one")
    rig.submit("gone")
    rig.queue.abort("gone")
    assert rig.sent == [] and not rig.queue.ready
    rig.queue.engine_started()
    (command,) = rig.sent
    assert isinstance(command, Submit)
    assert [each.request_id for each in command.requests] == ["one"]


@on_loop
async def test_a_request_that_kills_engines_is_ended(rig: Rig) -> None:
    """A request that makes progress is not ended."""
    poison, good = rig.submit("poison", n=2), rig.submit("good")
    rig.bring("poison", 5, index=1, end="stop")
    rig.bring("poison", 5)
    for _ in range(MAX_DEATHS - 1):
        assert set(rig.resubmitted()) == {"poison", "good"}
        rig.bring("good", 1)
    assert set(rig.resubmitted()) == {"good"}
    *_, last = await drain(poison)
    assert (last.index, last.finish_reason) == (0, "error")
    assert "died while they ran this request" in str(last.stop_reason)
    rig.bring("good", 2, end="stop")
    assert len(await drain(good)) == MAX_DEATHS


@on_loop
async def test_only_so_many_wait_for_their_first_token(rig: Rig) -> None:
    for name in "abcd":
        rig.submit(name)
    with pytest.raises(QueueFull):
        rig.submit("e")
    rig.bring("b", 1)
    rig.submit("e")
    with pytest.raises(QueueFull) as caught:
        rig.submit("f")
    assert caught.value.retry_after_s > 0


def test_one_client_leaves_room_for_others() -> None:
    rig = Rig(max_queue=4, client_queue=3)
    for name in "abc":
        rig.submit(name, client="many")
    with pytest.raises(ClientQueueFull, match=r"3 of its requests wait .*--max-queue-per-client"):
        rig.submit("d", client="many")
    rig.submit("e", client="one")
    with pytest.raises(QueueFull, match=r"4 requests wait .*\(--max-queue\)"):
        rig.submit("f", client="another")
    rig.bring("a", 1)
    rig.submit("g", client="many")


@pytest.mark.parametrize(
    "options, most", [({}, 256), ({"max_queue": 7}, 4), ({"max_queue_per_client": 9}, 9)]
)
def test_a_client_may_have_half_of_the_queue_unless_told(
    options: dict[str, int], most: int
) -> None:
    assert ServeOptions(**options).client_queue == most


@pytest.mark.parametrize(
    "address, client",
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
        (None, ""),
    ],
)
def test_a_client_is_its_address(address: str | None, client: str) -> None:
    peer = None if address is None else (address, 5)
    assert client_of(fastapi.Request({"type": "http", "client": peer})) == client


def test_nothing_is_taken_before_the_first_engine_runs() -> None:
    queue = RequestQueue(lambda command: None, 4, 4, itertools.count())
    assert not queue.ready
    with pytest.raises(Unavailable) as caught:
        queue.submit(Request("one", None, [1], SamplingParams()), asyncio.Queue())
    assert caught.value.retry_after_s > 0


@on_loop
async def test_draining_lets_finish_what_runs(rig: Rig) -> None:
    one = rig.submit("one")
    rig.queue.drain()
    with pytest.raises(Unavailable):
        rig.submit("two")
    assert not rig.queue.ready
    drained = asyncio.create_task(rig.queue.drained())
    await asyncio.sleep(0)
    assert not drained.done()
    rig.bring("one", 1, end="stop")
    await drained
    assert len(await drain(one)) == 1


@on_loop
async def test_closing_ends_what_runs_for_its_readers_too(rig: Rig) -> None:
    one = rig.submit("one")
    reading = asyncio.create_task(drain(one))
    await asyncio.sleep(0)
    rig.queue.close()
    assert await reading == []
    assert rig.sent[-1] == Abort(["one"])
    await rig.queue.drained()


def test_ready_as_long_as_steps_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(queue_module.time, "monotonic", lambda: now)
    queue = RequestQueue(lambda command: None, 4, 4, itertools.count())
    queue.engine_started()
    assert queue.ready
    now += queue_module.STEP_TIMEOUT_S + 0.1
    assert not queue.ready
    report: Any = object()
    queue.reported(report)
    assert queue.ready and queue.report is report
    queue.engine_died()
    assert not queue.ready
