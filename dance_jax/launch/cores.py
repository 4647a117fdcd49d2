"""How much of this machine's cores each local server's thread pools are made for.

Limited, not pinned: XLA sizes its pools by the cores it may use when its client is made; afterwards
the system may put their threads anywhere. (measured) A server pinned to a core that another program
kept busy took 28 s to import JAX and 300 ms for a step, and in lock step all servers waited for it.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence


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


@contextlib.contextmanager
def limited(cores: Iterable[int]) -> Iterator[None]:
    """Within, this thread may use only these cores; then all threads again what they could."""
    if not (wanted := set(cores)) or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        for task in pathlib.Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # the thread has ended
                os.sched_setaffinity(int(task.name), before)
