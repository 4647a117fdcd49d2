"""What the checks outside pytest share: those of the testbed, of HAProxy and of the dashboard.

They are not part of pytest because they may install programs of the system.
"""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

from benchmarks.namespaces.machine import find, install_missing
from dance_jax.config import UserError
from tests.launch.launched import Launch, free_ports

#: Servers of `three_servers`.
NAMES = ("alpha", "beta", "gamma")


class Checks:
    """Prints checks, and counts those that passed and failed."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def check(self, holds: bool, what: str) -> None:
        self.passed += holds
        self.failed += not holds
        print(f"{'ok' if holds else 'FAILED'}: {what}", flush=True)


def run_checks(
    programs: Sequence[str],
    work: Callable[[Checks, pathlib.Path, contextlib.ExitStack], None],
) -> int:
    """Install missing programs and run checks; returns the exit code.

    Args:
        programs: that the checks need.
        work: gets a temporary directory, and a stack that is closed at the end.
    """
    try:
        install_missing(programs)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    checks = Checks()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        work(checks, pathlib.Path(folder), stack)
    print(f"{checks.passed} passed, {checks.failed} failed")
    return 1 if checks.failed else 0


@contextlib.contextmanager
def three_servers(folder: pathlib.Path, *options: object) -> Iterator[tuple[Launch, int]]:
    """Three servers of the demo, ready, any two of which hold all experts; and the first's port.

    Args:
        folder: for the hosts file.
        options: further ones of the launch.
    """
    folder.mkdir(exist_ok=True)
    lines = (f"{name} address=localhost memory=8MiB bandwidth=100Mbps\n" for name in NAMES)
    (folder / "hosts.txt").write_text("".join(lines))
    port = free_ports(len(NAMES))
    words = ["--hosts", folder / "hosts.txt", "--port", port, "--rebalance-interval", 0, *options]
    launch = Launch([sys.executable, "-m", "dance_jax.launch", *map(str, words)], folder)
    try:
        launch.wait_for("curl ")
        yield launch, port
    finally:
        if launch.process.poll() is None:
            launch.note_workers()
        launch.kill()


@contextlib.contextmanager
def haproxy(folder: pathlib.Path, configuration: str) -> Iterator[pathlib.Path]:
    """HAProxy with a configuration; its log."""
    file, log = folder / "haproxy.cfg", folder / "haproxy.log"
    file.write_text(configuration)
    command = [find("haproxy") or "haproxy", "-db", "-f", str(file)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield log
    finally:
        process.terminate()
        process.wait()
