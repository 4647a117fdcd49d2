"""Find everything on this machine that belongs to a testbed, by its prefix, and remove it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator

from dance_jax.config import UserError

from .cores import cpu_controller
from .machine import find

#: Has one directory per testbed, with all its files. Gone after a reboot, as namespaces are.
STATE = pathlib.Path("/run/dance_jax_testbed")
#: Where `ip` keeps the names of namespaces, and the files that `ip` mounts over /etc in each.
NAMESPACES, OVER_ETC = pathlib.Path("/run/netns"), pathlib.Path("/etc/netns")
#: Seconds within which killed processes must be gone.
KILL_TIMEOUT_S = 10


def prefix(name: str) -> str:
    """Return the prefix of a testbed's namespaces and cgroups.

    It is the prefix of no other testbed, because names have no dots.
    """
    return f"dance-{name}."


def remains(name: str) -> list[str]:
    """Describe everything on this machine that belongs to a testbed: processes and paths."""
    found = [f"process {pid} ({line})" for pid, line in processes(name).items()]
    paths = [*_own(NAMESPACES, name), *_cgroups(name), *_own(OVER_ETC, name), STATE / name]
    return found + [str(path) for path in paths if path.exists()]


def processes(name: str) -> dict[int, str]:
    """Return the process ids and command lines of all processes in a testbed."""
    pids = {pid for namespace in _own(NAMESPACES, name) for pid in inhabitants(namespace.name)}
    for cgroup in _cgroups(name):
        pids.update(map(int, (cgroup / "cgroup.procs").read_text().split()))
    lines = {}
    for pid in sorted(pids - {os.getpid()}):
        with contextlib.suppress(OSError):  # the process has just ended
            line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
            lines[pid] = line.replace(b"\0", b" ").decode(errors="replace").strip()
    return lines


def inhabitants(namespace: str) -> list[int]:
    """Return the ids of the processes in a network namespace."""
    # An interrupted `ip netns add` leaves an empty file, which ip refuses: it has no processes.
    command = [find("ip") or "ip", "netns", "pids", namespace]
    return [int(pid) for pid in subprocess.run(command, capture_output=True).stdout.split()]


def down(name: str) -> None:
    """Remove a testbed, also one that is only partly there, and kill its processes.

    Raises:
        UserError: something could not be removed.
    """
    with _undisturbed():
        _kill(name)
        for cgroup in _cgroups(name):
            with contextlib.suppress(OSError):
                cgroup.rmdir()
        for namespace in _own(NAMESPACES, name):
            # This also deletes the namespace's links. An empty file is no namespace: ip refuses it,
            # and it is unlinked.
            command = [find("ip") or "ip", "netns", "delete", namespace.name]
            subprocess.run(command, capture_output=True)
            namespace.unlink(missing_ok=True)
        for directory in (*_own(OVER_ETC, name), STATE / name):
            shutil.rmtree(directory, ignore_errors=True)
        for shared in (STATE, OVER_ETC):
            with contextlib.suppress(OSError):  # absent, or still used by another testbed
                shared.rmdir()
        if left := remains(name):
            raise UserError(f"testbed {name}: these could not be removed: {', '.join(left)}")


def _kill(name: str) -> None:
    """Kill until no process is left: a killed process may have started others meanwhile."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while (alive := processes(name)) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _own(directory: pathlib.Path, name: str) -> list[pathlib.Path]:
    return sorted(directory.glob(f"{prefix(name)}*"))


def _cgroups(name: str) -> list[pathlib.Path]:
    root = cpu_controller()
    return _own(root, name) if root else []


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore SIGINT, SIGTERM and SIGHUP in this process, and in those it starts, for the block."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
