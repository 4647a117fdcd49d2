"""Work beside a measurement."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any

from dance_jax.bench.http import Address, HttpError, request

#: Seconds before a viewer whose server has gone connects again.
RETRY_S = 1.0


@contextlib.asynccontextmanager
async def background(work: Iterable[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run coroutines within the block, and cancel them at its end."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def watch(server: Address) -> None:
    """Follow /events of a server until cancelled, as a dashboard does."""
    while True:
        with contextlib.suppress(HttpError):
            async with request(server, "GET", "/events") as response:
                async for _ in response.events():
                    pass
        await asyncio.sleep(RETRY_S)
