"""Asks: as requests arrive, a batch at a time, or with so many in flight."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from .client import Answer, Api, Call

Result = TypeVar("Result")
#: Called whenever something has finished.
Done = Callable[[], None]


async def open_loop(api: Api, calls: Sequence[Call], done: Done) -> list[Answer]:
    """Each call at its arrival, whatever has become of the others; answers in the calls' order."""
    origin = time.perf_counter()

    async def one(call: Call) -> Answer:
        await _sleep_until(origin + call.arrival_s)
        answer = await api.answer(call, origin, call.arrival_s)
        done()
        return answer

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(call)) for call in calls]
    return [task.result() for task in tasks]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Calls that started together."""

    #: Seconds after the run's start.
    start_s: float
    size: int
    #: Calls that had arrived and found no place in it.
    left: int


async def gated(
    api: Api, calls: Sequence[Call], rows: Sequence[int], done: Done
) -> tuple[list[Answer], list[Batch]]:
    """A batch at a time: the next one starts when all answers of the one before are finished.

    Args:
        rows: of each server, calls in a batch at most; the first that arrived go first.
    """
    origin = time.perf_counter()
    waiting: list[collections.deque[Call]] = [collections.deque() for _ in rows]
    coming = collections.deque(sorted(calls, key=lambda call: call.arrival_s))
    answers: list[Answer] = []
    batches: list[Batch] = []

    async def one(call: Call) -> None:
        answers.append(await api.answer(call, origin, call.arrival_s))
        done()

    while coming or any(waiting):
        if not any(waiting):
            await _sleep_until(origin + coming[0].arrival_s)
        now_s = time.perf_counter() - origin
        while coming and coming[0].arrival_s <= now_s:
            call = coming.popleft()
            waiting[call.server].append(call)
        batch = [
            queue.popleft()
            for queue, most in zip(waiting, rows, strict=True)
            for _ in range(min(most, len(queue)))
        ]
        if batch:
            batches.append(Batch(now_s, len(batch), sum(map(len, waiting))))
            await asyncio.gather(*map(one, batch))
    return answers, batches


async def bounded(
    jobs: Sequence[tuple[int, Callable[[], Awaitable[Result]]]],
    in_flight: Sequence[int],
    done: Done,
) -> list[Result]:
    """Jobs of each server in their order, with so many of each server at once.

    Args:
        jobs: (server, what is to be done).
        in_flight: of each server.

    Returns:
        results in the jobs' order.
    """
    found: dict[int, Result] = {}
    queues = [
        collections.deque(n for n, (server, _) in enumerate(jobs) if server == own)
        for own in range(len(in_flight))
    ]

    async def work(queue: collections.deque[int]) -> None:
        while queue:
            number = queue.popleft()
            found[number] = await jobs[number][1]()
            done()

    async with asyncio.TaskGroup() as group:
        for queue, count in zip(queues, in_flight, strict=True):
            for _ in range(count):
                group.create_task(work(queue))
    return [found[number] for number in range(len(jobs))]


async def _sleep_until(moment: float) -> None:
    """Until `time.perf_counter` shows it."""
    while (left_s := moment - time.perf_counter()) > 0:
        await asyncio.sleep(left_s)
