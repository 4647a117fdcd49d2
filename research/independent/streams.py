"""Streams of a server, one after another while something else happens."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Sequence

from benchmarks.serving.client import Answer, Api, Call
from benchmarks.serving.cluster import ClusterError
from benchmarks.serving.figures import first_token_s, gaps_s


async def whole(api: Api, call: Call) -> Answer:
    """The answer to a call that comes now.

    Raises:
        ClusterError: it is not whole.
    """
    answer = await api.answer(call, time.perf_counter(), 0.0)
    if answer.error is not None:
        raise ClusterError(f"a request of server {call.server} failed: {answer.error}")
    return answer


@contextlib.asynccontextmanager
async def streaming(api: Api, calls: Sequence[Call]) -> AsyncIterator[list[Answer]]:
    """Asks each call again and again while the block runs, and waits for the last answers.

    Yields:
        Answers as they become whole; complete after the block.
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
    """Seconds in which a user waited for a token, the first or a later one."""
    return max([*gaps_s(answers), *first_token_s(answers)])


def same(answers: Iterable[Answer], quiet: dict[int, str]) -> tuple[int, int]:
    """Answers with the text of a quiet run, by server; and all."""
    found = [answer.text == quiet[answer.call.server] for answer in answers]
    return sum(found), len(found)
