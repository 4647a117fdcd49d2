"""What belongs to a testbed on this machine, found by its prefix, and its removal."""

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

#: One directory per testbed, with all its files. Gone at a reboot, as namespaces are.
STATE = pathlib.Path("/run/dance_jax_testbed")
#: Where `ip` keeps the names of namespaces, and the files that it lays over /etc in each.
NAMESPACES, OVER_ETC = pathlib.Path("/run/netns"), pathlib.Path("/etc/netns")
#: Seconds until killed processes must be gone.
KILL_TIMEOUT_S = 10


def prefix(name: str) -> str:
    """Of a testbed's namespaces and cgroups. No other's begins so: a name has no dot."""
    return f"dance-{name}."


def remains(name: str) -> list[str]:
    """Everything on this machine that belongs to a testbed, in words."""
    found = [f"process {pid} ({line})" for pid, line in processes(name).items()]
    paths = [*_own(NAMESPACES, name), *_cgroups(name), *_own(OVER_ETC, name), STATE / name]
    return found + [str(path) for path in paths if path.exists()]


def processes(name: str) -> dict[int, str]:
    """Process id and command line of everything that runs in a testbed."""
    pids: set[int] = set()
    for namespace in _own(NAMESPACES, name):
        # One whose making was cut off is an empty file, which ip refuses: it has no processes.
        command = [find("ip") or "ip", "netns", "pids", namespace.name]
        pids.update(map(int, subprocess.run(command, capture_output=True).stdout.split()))
    for cgroup in _cgroups(name):
        pids.update(map(int, (cgroup / "cgroup.procs").read_text().split()))
    lines = {}
    for pid in sorted(pids - {os.getpid()}):
        with contextlib.suppress(OSError):  # it has just ended
            line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
            lines[pid] = line.replace(b"\0", b" ").decode(errors="replace").strip()
    return lines


def down(name: str) -> None:
    """Removes a testbed, also one that is there in part, and ends all that runs in it.

    Raises:
        UserError: something is left.
    """
    with _undisturbed():
        _kill(name)
        for cgroup in _cgroups(name):
            with contextlib.suppress(OSError):
                cgroup.rmdir()
        for namespace in _own(NAMESPACES, name):
            # Its links go with it. An empty file that is none is refused, and unlinked.
            command = [find("ip") or "ip", "netns", "delete", namespace.name]
            subprocess.run(command, capture_output=True)
            namespace.unlink(missing_ok=True)
        for directory in (*_own(OVER_ETC, name), STATE / name):
            shutil.rmtree(directory, ignore_errors=True)
        for shared in (STATE, OVER_ETC):
            with contextlib.suppress(OSError):  # not there, or still another testbed's
                shared.rmdir()
        if left := remains(name):
            raise UserError(f"testbed {name}: these are left: {', '.join(left)}")


def _kill(name: str) -> None:
    """Kills until nothing is there: what is killed may have started something meanwhile."""
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
    """Within, neither Ctrl-C nor a polite signal ends this process or what it starts."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
