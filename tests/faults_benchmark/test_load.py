"""Tests of the load of benchmarks/chaos.py, against a small HTTP server in this process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable

import pytest

from benchmarks.faults.load import Case, Load
from benchmarks.faults.report import Report
from dance_jax.bench.http import Address

#: What a server does with a request: answers with a text, or (None) closes the connection.
Answer = Callable[[dict], str | None]


@contextlib.asynccontextmanager
async def served(answer: Answer) -> AsyncIterator[Address]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length:")[2].split()[0])
        asked = json.loads(await reader.readexactly(size))
        if (text := answer(asked)) is not None:
            body = json.dumps({"choices": [{"text": text}]})
            if asked["stream"]:
                body = f"data: {body}\n\ndata: [DONE]\n\n"
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])


def cases() -> itertools.chain[Case]:
    return itertools.chain.from_iterable(
        (Case(f"{n}", None, stream=False), Case(f"{n}", n, stream=True)) for n in itertools.count()
    )


def reported(load: Load) -> Report:
    report = Report("a fault", [], [], 2.0, 6.0)
    report.count(load.records, ["alpha"], [], 0.0)
    return report


@pytest.mark.parametrize(
    ("text", "dead", "outcome"),
    [
        ("right", set(), None),
        ("wrong", set(), "changed"),
        (None, set(), "lost"),
        # Who has no front end any more cannot get an answer.
        (None, {0}, "cut"),
    ],
)
def test_every_outcome_is_told_from_the_others(
    text: str | None, dead: set[int], outcome: str | None
) -> None:
    now: list[str | None] = ["right"]

    async def work() -> Load:
        async with served(lambda asked: now[0]) as address:
            load = Load([address], each=2)
            assert await load.learn(cases(), 2) == 0
            now[0], load.dead = text, dead
            async with load.running():
                await asyncio.sleep(0.2)
                assert await load.settled(5.0) == 0
        return load

    report = reported(asyncio.run(work()))
    assert report.requests >= 2
    for name in ("changed", "lost", "cut"):
        assert getattr(report, name) == (report.requests if name == outcome else 0)
    assert report.failed == (outcome in ("changed", "lost"))


def test_a_request_that_servers_answer_differently_is_left_out() -> None:
    async def work() -> int:
        async with (
            served(lambda asked: "same") as one,
            served(lambda asked: "other" if asked["prompt"] == "0" else "same") as two,
        ):
            return await Load([one, two], each=1).learn(cases(), 3)

    assert asyncio.run(work()) == 2


def test_a_request_that_never_ends_is_counted() -> None:
    async def work() -> int:
        hang = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await hang.wait()
            writer.close()

        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            load = Load([Address("127.0.0.1", server.sockets[0].getsockname()[1])], each=3)
            load._cases = [next(cases())]
            async with load.running():
                await asyncio.sleep(0.1)
                late = await load.settled(0.2)
            hang.set()
        return late

    assert asyncio.run(work()) == 3
