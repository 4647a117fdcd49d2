"""Share this machine's cores among the thread pools of its servers.

Cores are limited, not pinned: XLA sizes its pools by the allowed cores when its client is made;
afterwards the system may run the threads anywhere. Measured: a server pinned to a core that another
program kept busy took 28 s to import JAX and 300 ms per step, and in lock step all servers waited
for it.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence


def available() -> list[int]:
    """Cores that this process may use, ascending; empty if unknown.

    A quota of 1.5 cores counts as two. Measured: with more threads than that, the host spends time
    on waking them for nothing.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    return cores[: max(1, math.ceil(min(quota(), len(cores))))]


def quota(proc: pathlib.Path = pathlib.Path("/proc/self")) -> float:
    """Number of cores that cgroups (version 1 or 2) allow this process; inf without a limit."""
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
    """Number of cores that one cgroup allows."""
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
    """Split the cores into runs in proportion to the servers' devices.

    A core at a boundary belongs to both runs, so every server has at least one core.
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
    """Restrict this thread to these cores; afterwards restore the old set for all threads."""
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
