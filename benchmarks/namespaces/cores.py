"""Shares of this machine's cores for the hosts, in proportion to their devices.

Several devices take turns on few cores. Without shares, a busy host uses the cores that its
neighbours leave idle, so a bad balance of work between hosts costs nothing. A host is slow under
too much work only if it has its own share. A quota (of the kernel's cpu controller) is exact and
may be a fraction of a core; pinning to cores is not exact where the hosts' ranges of cores overlap.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Sequence

from dance_jax.launch.worker import cores

from .hosts import Host

QUOTA, PIN, NONE = MODES = ("quota", "pin", "none")
#: Period of the quota in microseconds. Short, because a host that has used up its share stands
#: still for the rest of the period.
PERIOD_US = 10_000


def share_cores(hosts: Sequence[Host], mode: str) -> tuple[str, list[Host]]:
    """Give every host its share of the cores.

    Args:
        hosts: the hosts, without shares.
        mode: quota, pin or none.

    Returns:
        The mode in force (pin in place of quota if the system has no quota), and the hosts with
        their shares.
    """
    available, devices = cores.available(), [host.devices for host in hosts]
    if mode == QUOTA and cpu_controller() is None:
        mode = PIN
    shares = {
        QUOTA: [len(available) * count / sum(devices) for count in devices],
        PIN: cores.share(available, devices),
        NONE: [None] * len(hosts),
    }[mode]
    shared = zip(hosts, shares, strict=True)
    return mode, [dataclasses.replace(host, share=share) for host, share in shared]


def describe(hosts: Iterable[Host], mode: str) -> str:
    """Describe, in a line for the user, how cores are shared, each host's share, and the effect."""
    hosts = list(hosts)
    counts = f"{sum(host.devices for host in hosts)} devices on {len(cores.available())} cores"
    if mode == NONE:
        return (
            f"cores: {counts}, not shared out: a busy host uses cores that other hosts leave idle, "
            "so times do not show how evenly work is spread over the hosts"
        )
    each = ", ".join(f"{host.name} {show_share(host.share)}" for host in hosts)
    how = {
        QUOTA: "shared out by quota (cpu controller), so a host with too much work is slow, as a "
        "separate machine would be",
        PIN: "each host pinned to its cores, but hosts on the same core use the time that the "
        "others leave idle there, which hides some of a bad balance of work",
    }[mode]
    return f"cores: {counts}, {how}: {each}"


def show_share(share: float | list[int] | None) -> str:
    """Format a share: `0.50`, `core 0`, `cores 0,1` or `all`."""
    if share is None:
        return "all"
    if isinstance(share, list):
        return f"core{'s' * (len(share) > 1)} {','.join(map(str, share))}"
    return f"{share:.2f}"


def cpu_controller(mounts: str = "/proc/self/mounts") -> pathlib.Path | None:
    """Return the root of the cgroups (version 1 or 2) that can limit the cpu, or None.

    Args:
        mounts: the file that lists the mounted file systems.
    """
    for line in pathlib.Path(mounts).read_text().splitlines():
        _, path, kind, options, *_ = line.split()
        root = pathlib.Path(path)
        limits = {
            "cgroup": "cpu" in options.split(",") and (root / "cpu.cfs_quota_us").exists(),
            "cgroup2": "cpu" in _words(root / "cgroup.controllers"),
        }
        if limits.get(kind) and os.access(root, os.W_OK) and _passed_on(root):
            return root
    return None


def make_quota(cgroup: pathlib.Path, share: float) -> None:
    """Create a cgroup whose processes together get `share` cores."""
    cgroup.mkdir()
    quota = round(share * PERIOD_US)
    if (cgroup / "cpu.max").exists():
        (cgroup / "cpu.max").write_text(f"{quota} {PERIOD_US}")
    else:
        (cgroup / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (cgroup / "cpu.cfs_quota_us").write_text(str(quota))


def _passed_on(root: pathlib.Path) -> bool:
    """Return whether the root's children have the cpu controller; enable it in version 2."""
    control = root / "cgroup.subtree_control"
    if control.exists() and "cpu" not in _words(control):
        try:
            control.write_text("+cpu")
        except OSError:  # in a container, a root that holds processes cannot enable controllers
            return False
    return True


def _words(path: pathlib.Path) -> list[str]:
    return path.read_text().split() if path.exists() else []
