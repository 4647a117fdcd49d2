"""Send requests as they arrive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from dance_jax.bench.client import Answer, Api, Call

#: Called whenever a request has finished.
Done = Callable[[], None]


async def open_loop(api: Api, calls: Sequence[Call], done: Done) -> list[Answer]:
    """Send each call at its arrival time, regardless of other answers.

    Returns:
        The answers, in the order of the calls.
    """
    origin = time.perf_counter()

    async def one(call: Call) -> Answer:
        await sleep_until(origin + call.arrival_s)
        answer = await api.answer(call, origin, call.arrival_s)
        done()
        return answer

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(call)) for call in calls]
    return [task.result() for task in tasks]


async def sleep_until(moment: float) -> None:
    """Sleep until `time.perf_counter()` reaches `moment`."""
    while (left_s := moment - time.perf_counter()) > 0:
        await asyncio.sleep(left_s)
