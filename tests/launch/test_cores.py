"""How many cores a process has if cgroups limit them."""

from __future__ import annotations

import math
import pathlib

import pytest

from dance_jax.launch.worker import cores


@pytest.mark.parametrize(
    ("version", "limits", "found"),
    [
        (1, {"": "-1 100000", "host": "5000 10000"}, 0.5),
        (1, {"": "-1 100000", "host": "-1 100000"}, math.inf),
        (2, {"pod": "150000 100000", "pod/host": "max 100000"}, 1.5),
        (2, {}, math.inf),
    ],
)
def test_the_smallest_quota_of_all_levels_counts(
    tmp_path: pathlib.Path, version: int, limits: dict[str, str], found: float
) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    for path, limit in limits.items():
        (root / path).mkdir(parents=True, exist_ok=True)
        allowed, period = limit.split()
        if version == 1:
            (root / path / "cpu.cfs_quota_us").write_text(f"{allowed}\n")
            (root / path / "cpu.cfs_period_us").write_text(f"{period}\n")
        else:
            (root / path / "cpu.max").write_text(f"{limit}\n")
    own = max(limits, key=len, default="")
    kind, options = ("cgroup", "rw,cpu") if version == 1 else ("cgroup2", "rw")
    (proc / "mounts").write_text(f"proc /proc proc rw 0 0\ncgroup {root} {kind} {options} 0 0\n")
    controllers = "4:memory:/elsewhere\n1:cpu,cpuacct" if version == 1 else "0:"
    (proc / "cgroup").write_text(f"{controllers}:/{own}\n")
    assert cores.quota(proc) == found


def test_without_cgroups_there_is_no_quota(tmp_path: pathlib.Path) -> None:
    assert cores.quota(tmp_path) == math.inf
