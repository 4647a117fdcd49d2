"""Gate and bound: which requests are in flight together, as seen by the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from benchmarks.serving.gates import bounded, gated
from dance_jax.bench.client import Answer, Api, Call
from tests.bench.fake_server import FakeServer
from tests.bench.test_drive import calls, driven, nothing

#: Seconds per token, so that answers overlap if the client lets them.
PACE_S = 0.03


def test_a_batch_starts_when_the_one_before_is_finished_everywhere() -> None:
    log: list[tuple[str, list[int]]] = []
    # Both servers share one log; a server's own log would have only its own rows.
    servers = [FakeServer(events=log, pace_s=PACE_S) for _ in range(2)]
    asked = [*calls(5), *calls(3, server=1)]
    answers, batches = driven(servers, lambda api: gated(api, asked, [2, 1], nothing))
    assert len(answers) == 8 and all(answer.complete for answer in answers)
    assert [(batch.size, batch.left) for batch in batches] == [(3, 5), (3, 2), (2, 0)]
    at = 0
    for batch in batches:
        part = log[at : at + 2 * batch.size]
        started = sorted(prompt for event, prompt in part if event == "start")
        ended = sorted(prompt for event, prompt in part if event == "end")
        assert started == ended and len(started) == batch.size
        at += 2 * batch.size
    order = [prompt[0] for event, prompt in log if event == "start"]
    assert sorted(order[:3]) == [0, 1, 100] and sorted(order[6:]) == [4, 102]


def test_calls_of_one_batch_start_together() -> None:
    server = FakeServer(gather=4)
    answers, batches = driven([server], lambda api: gated(api, calls(4), [4], nothing))
    assert len(answers) == server.most_running == 4 and len(batches) == 1


def test_a_gate_waits_for_arrivals() -> None:
    asked = [Call(0, [n], 1, arrival_s=0.15 * n) for n in range(2)]
    answers, batches = driven([FakeServer()], lambda api: gated(api, asked, [8], nothing))
    assert [batch.size for batch in batches] == [1, 1]
    assert all(batch.start_s >= call.arrival_s for batch, call in zip(batches, asked, strict=True))
    assert all(answer.due_s == answer.call.arrival_s for answer in answers)


def test_a_bound_is_reached_and_kept() -> None:
    servers = [FakeServer(gather=3, pace_s=PACE_S), FakeServer(pace_s=PACE_S)]
    asked = [*calls(9), *calls(2, server=1)]

    async def drive(api: Api) -> list[Answer]:
        def job(call: Call) -> Callable[[], Awaitable[Answer]]:
            return lambda: api.answer(call, 0.0, 0.0)

        return await bounded([(call.server, job(call)) for call in asked], [3, 1], nothing)

    found = driven(servers, drive)
    assert [answer.call for answer in found] == asked
    assert [server.most_running for server in servers] == [3, 1]


def test_what_fails_in_a_job_is_not_swallowed() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    async def drive() -> None:
        await bounded([(0, fail)], [1], nothing)

    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(drive())
    assert raised.group_contains(ZeroDivisionError)
