"""Each host's share of this machine's cores, in proportion to its devices.

Several devices take turns on few cores, so whichever host has work finds the cores that its
neighbours leave, and a bad balance of work between them costs nothing. Only a share that is a
host's own makes it slow when it has too much to do. A quota (of the kernel's cpu controller) is
exact and may be a part of a core; pinning to cores is not, where runs of cores overlap.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Sequence

from dance_jax.launch.worker import cores

from .hosts import Host

QUOTA, PIN, NONE = MODES = ("quota", "pin", "none")
#: Microseconds. Short, as a host that has used up its share stands still for the rest of a period.
PERIOD_US = 10_000


def share_cores(hosts: Sequence[Host], mode: str) -> tuple[str, list[Host]]:
    """Gives every host its share.

    Args:
        hosts: whose shares.
        mode: quota, pin or none.

    Returns:
        The mode in force, which is pin where there is no quota, and the hosts with shares.
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
    """What is in force, how much each host has, and why it matters."""
    hosts = list(hosts)
    counts = f"{sum(host.devices for host in hosts)} devices on {len(cores.available())} cores"
    if mode == NONE:
        return (
            f"cores: {counts}, not shared out: a busy host takes what the others leave, so times "
            "say nothing about how evenly work is spread over the hosts"
        )
    each = ", ".join(f"{host.name} {show_share(host.share)}" for host in hosts)
    how = {
        QUOTA: "shared out by quota (cpu controller), so a host with too much work is slow as if "
        "it were a machine of its own",
        PIN: "each host pinned to its own, but those on the same core still take what the others "
        "leave there, which hides some of a bad balance of work",
    }[mode]
    return f"cores: {counts}, {how}: {each}"


def show_share(share: float | list[int] | None) -> str:
    """`0.50`, `core 0`, `cores 0,1` or `all`."""
    if share is None:
        return "all"
    if isinstance(share, list):
        return f"core{'s' * (len(share) > 1)} {','.join(map(str, share))}"
    return f"{share:.2f}"


def cpu_controller(mounts: str = "/proc/self/mounts") -> pathlib.Path | None:
    """Root of the cgroups whose cpu can be limited, of version 1 or 2; None: there is none."""
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
    """Makes a cgroup whose processes have so many cores, all together."""
    cgroup.mkdir()
    quota = round(share * PERIOD_US)
    if (cgroup / "cpu.max").exists():
        (cgroup / "cpu.max").write_text(f"{quota} {PERIOD_US}")
    else:
        (cgroup / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (cgroup / "cpu.cfs_quota_us").write_text(str(quota))


def _passed_on(root: pathlib.Path) -> bool:
    """The root's children have the controller; version 2 has to be told so."""
    control = root / "cgroup.subtree_control"
    if control.exists() and "cpu" not in _words(control):
        try:
            control.write_text("+cpu")
        except OSError:  # a container's root that holds processes passes nothing on
            return False
    return True


def _words(path: pathlib.Path) -> list[str]:
    return path.read_text().split() if path.exists() else []
