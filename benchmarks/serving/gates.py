"""Send requests one batch at a time, or with a bounded number in flight."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from dance_jax.bench.client import Answer, Api, Call
from dance_jax.bench.drive import Done, sleep_until

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of calls that started together."""

    #: Seconds after the run's start.
    start_s: float
    size: int
    #: Calls that had arrived but did not fit into the batch.
    left: int


async def gated(
    api: Api, calls: Sequence[Call], rows: Sequence[int], done: Done
) -> tuple[list[Answer], list[Batch]]:
    """Send one batch at a time; the next starts when all answers of the previous have finished.

    Args:
        api: of the servers.
        calls: the requests, with their arrival times.
        rows: maximum calls of each server in a batch, taken in the order of arrival.
        done: called after each answer.
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
            await sleep_until(origin + coming[0].arrival_s)
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
    """Run each server's jobs in order, with a bounded number at once.

    Args:
        jobs: server and function to await, for each job.
        in_flight: number of jobs of each server that run at once.
        done: called after each job.

    Returns:
        The results, in the order of the jobs.
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
