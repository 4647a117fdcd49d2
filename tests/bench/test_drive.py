"""Open loop, gate and bound: which requests are in flight together, as seen by the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from dance_jax.bench.client import Api, Call
from dance_jax.bench.drive import open_loop
from dance_jax.bench.http import Address
from tests.bench.fake_server import FakeServer, running

Result = TypeVar("Result")
#: Seconds per token, so that answers overlap if the client lets them.
PACE_S = 0.03


def nothing() -> None:
    """A callback that does nothing."""


def driven(servers: Sequence[FakeServer], drive: Callable[[Api], Awaitable[Result]]) -> Result:
    async def ask(urls: list[str]) -> Result:
        return await drive(await Api.connect([Address.of(url) for url in urls]))

    with running(servers) as urls:
        return asyncio.run(ask(urls))


def calls(count: int, server: int = 0) -> list[Call]:
    """Calls with distinct prompts that all arrive at once."""
    return [Call(server, [100 * server + n], 3) for n in range(count)]


def test_an_open_loop_does_not_wait_for_answers() -> None:
    server, asked = FakeServer(gather=6), calls(6)
    finished: list[None] = []
    found = driven([server], lambda api: open_loop(api, asked, lambda: finished.append(None)))
    assert [answer.call for answer in found] == asked
    assert all(answer.complete for answer in found) and len(finished) == 6
    assert server.most_running == 6


def test_arrivals_are_waited_for() -> None:
    asked = [Call(0, [n], 1, arrival_s=0.1 * (2 - n)) for n in range(3)]
    server = FakeServer()
    found = driven([server], lambda api: open_loop(api, asked, nothing))
    assert server.prompts == [[2], [1], [0]]
    for answer in found:
        assert answer.due_s == answer.call.arrival_s <= answer.piece_s[0]
