"""Resident memory of a launcher and everything it has started."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence

import psutil

#: Seconds between two looks.
PERIOD_S = 1.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """One look."""

    #: What had been done by then.
    done: int
    #: Bytes of all processes.
    resident: int


def resident(pid: int) -> int:
    """Bytes of a process and its descendants."""
    root = psutil.Process(pid)
    total = 0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            total += process.memory_info().rss
    return total


@contextlib.asynccontextmanager
async def watched(pid: int | None, done: Callable[[], int]) -> AsyncIterator[list[Sample]]:
    """Looks as long as the block runs, and once at its end; None: nothing to look at."""
    samples: list[Sample] = []
    if pid is None:
        yield samples
        return

    async def look() -> None:
        while True:
            samples.append(Sample(done(), resident(pid)))
            await asyncio.sleep(PERIOD_S)

    task = asyncio.create_task(look())
    try:
        yield samples
        samples.append(Sample(done(), resident(pid)))
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def unevenness(samples: Sequence[Sample], total: int) -> float | None:
    """Largest over smallest less 1, after the first quarter of `total`; None: no samples there."""
    late = [sample.resident for sample in samples if sample.done >= total / 4]
    return max(late) / min(late) - 1 if late else None
