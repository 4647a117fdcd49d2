"""How much of this machine's cores each local server's thread pools are made for.

Limited, not pinned: XLA sizes its pools by the cores it may use when its client is made; afterwards
the system may put their threads anywhere. (measured) A server pinned to a core that another program
kept busy took 28 s to import JAX and 300 ms for a step, and in lock step all servers waited for it.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence


def available() -> list[int]:
    """Cores this process may use, ascending; empty where the system cannot say.

    A quota of 1.5 cores counts as two: (measured) with more threads than that a host wakes them for
    nothing, and pays for it.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    return cores[: max(1, math.ceil(min(quota(), len(cores))))]


def quota(proc: pathlib.Path = pathlib.Path("/proc/self")) -> float:
    """Cores that cgroups, of version 1 or 2, leave this process; inf: they say nothing."""
    try:
        mounts = [line.split() for line in (proc / "mounts").read_text().splitlines()]
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
    except OSError:
        return math.inf
    paths = {name: path for _, names, path in groups for name in names.split(",")}
    limits = [math.inf]
    for _, mount, kind, options, *_ in mounts:
        controller = {"cgroup": "cpu", "cgroup2": ""}.get(kind)
        if controller not in paths or (controller and controller not in options.split(",")):
            continue
        root = pathlib.Path(mount)
        group = root / paths[controller].lstrip("/")
        limits += [_limit(each) for each in (group, *group.parents) if each.is_relative_to(root)]
    return min(limits)


def _limit(group: pathlib.Path) -> float:
    """Cores of one cgroup."""
    try:
        if (group / "cpu.max").exists():
            allowed, period = (group / "cpu.max").read_text().split()
        else:
            allowed = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
    except OSError:
        return math.inf
    return math.inf if allowed in ("max", "-1") else int(allowed) / int(period)


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
