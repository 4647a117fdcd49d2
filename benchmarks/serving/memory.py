"""Resident memory of a launcher and all its descendant processes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence

import psutil

#: Seconds between two samples.
PERIOD_S = 1.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """Resident memory at one moment."""

    #: Requests finished by then.
    done: int
    #: Resident bytes of all processes.
    resident: int


def resident(pid: int) -> int:
    """Return the resident bytes of a process and its descendants."""
    root = psutil.Process(pid)
    total = 0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # the process has just ended
            total += process.memory_info().rss
    return total


@contextlib.asynccontextmanager
async def watched(pid: int | None, done: Callable[[], int]) -> AsyncIterator[list[Sample]]:
    """Sample the memory of a process tree while the block runs, and once at its end.

    Args:
        pid: root of the process tree. If None, there are no samples.
        done: returns the number of requests finished so far.
    """
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
    """Return the largest over the smallest resident memory, minus 1, after the first quarter.

    Args:
        samples: in the order of time.
        total: number of all requests.

    Returns:
        None if there are no samples after the first quarter of the requests.
    """
    late = [sample.resident for sample in samples if sample.done >= total / 4]
    return max(late) / min(late) - 1 if late else None
