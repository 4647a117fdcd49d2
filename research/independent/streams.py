"""Streams that are repeated during a measurement."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Sequence

from dance_jax.bench.client import Answer, Api, Call
from dance_jax.bench.cluster import RunError
from dance_jax.bench.figures import first_token_s, gaps_s


async def whole(api: Api, call: Call) -> Answer:
    """Send a call now and return its complete answer.

    Raises:
        RunError: the answer is not complete.
    """
    answer = await api.answer(call, time.perf_counter(), 0.0)
    if answer.error is not None:
        raise RunError(f"a request to server {call.server} failed: {answer.error}")
    return answer


@contextlib.asynccontextmanager
async def streaming(api: Api, calls: Sequence[Call]) -> AsyncIterator[list[Answer]]:
    """Repeat each call during the block, and wait for the last answers.

    Yields:
        A list to which complete answers are added; it has all answers after the block.
    """
    over, answers = asyncio.Event(), []

    async def repeat(call: Call) -> None:
        while not over.is_set():
            answers.append(await whole(api, call))

    async with asyncio.TaskGroup() as group:
        for call in calls:
            group.create_task(repeat(call))
        try:
            yield answers
        finally:
            over.set()


def longest_gap(answers: Sequence[Answer]) -> float:
    """Return the longest time that a user waited for a token, the first included, in seconds."""
    return max([*gaps_s(answers), *first_token_s(answers)])


def same(answers: Iterable[Answer], quiet: dict[int, str]) -> tuple[int, int]:
    """Count the answers that have the text of the quiet run, given by server, and all answers."""
    found = [answer.text == quiet[answer.call.server] for answer in answers]
    return sum(found), len(found)
