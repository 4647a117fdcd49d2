"""Which cores of this machine each local server may use."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterable, Sequence


def available() -> list[int]:
    """Cores this process may use, ascending; empty where the system cannot say."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))


def share(cores: Sequence[int], devices: Sequence[int]) -> list[list[int]]:
    """Cuts the cores into runs in proportion to the servers' devices.

    A core that falls on two runs belongs to both, so everybody has one.

    >>> share([0, 1], [1, 1, 2])
    [[0], [0], [1]]
    >>> share([0, 1, 2, 3], [1, 2])
    [[0, 1], [1, 2, 3]]
    """
    total, start, runs = sum(devices), 0, []
    for count in devices:
        first = start * len(cores) // total
        last = -(-(start + count) * len(cores) // total)
        runs.append(list(cores[first:last]))
        start += count
    return runs


def pin(cores: Iterable[int]) -> None:
    """Lets all threads of this process, and those they make, use only these cores."""
    wanted = set(cores)
    if not wanted or not hasattr(os, "sched_setaffinity"):
        return
    for task in pathlib.Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # the thread has ended
            os.sched_setaffinity(int(task.name), wanted)
