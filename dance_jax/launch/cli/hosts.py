"""`dance-jax hosts`: add servers to a running service, remove them, or take them out for a while.

The command changes the hosts file and has the launcher read it again (SIGHUP).
"""

from __future__ import annotations

import os
import pathlib
import signal
import time
from collections.abc import Iterator, Sequence

from dance_jax.config import UserError
from dance_jax.launch.cli import running
from dance_jax.launch.cluster.changes import DONE, END, FILE_NAME
from dance_jax.launch.cluster.succession import InUse, launcher_pid, sole_launcher
from dance_jax.launch.planning.defaults import default_platform
from dance_jax.launch.planning.hosts_file import HostsFile

#: Seconds for the launcher to begin with a change.
BEGIN_S = 60.0


def main(arguments: Sequence[str], prog: str = "dance-jax hosts") -> int:
    """Run the command; returns 0 once the servers are as wanted."""
    parser = running.parser(
        prog,
        "Changes the servers of a running service, whose requests go on. A server that "
        "leaves finishes its requests while the others load its experts.",
    )
    parser.add_argument(
        "action",
        choices=("add", "remove", "drain"),
        help="add a server; remove one from the hosts file; drain: keep its line as a comment, so "
        "that `add NAME` brings the server back",
    )
    parser.add_argument(
        "server", nargs="+", help="a server's name; for a new one its line: name key=value ..."
    )
    parser.add_argument("--hosts", type=pathlib.Path, required=True, help="the hosts file")
    options = parser.parse_args(arguments)
    return running.run(
        lambda: change(options.action, " ".join(options.server), options.hosts, options.state_dir),
        "the launcher goes on with the change",
    )


def change(action: str, server: str, hosts: pathlib.Path, state_dir: pathlib.Path) -> int:
    """Change a hosts file, and the service that uses it.

    Args:
        action: "add", "remove" or "drain".
        server: name, or for a new server its line of the hosts file.
        hosts: the hosts file.
        state_dir: of the service.

    Returns:
        0, or 1 if the service refuses; the file is then as before.

    Raises:
        UserError: the server is not in the file or is there already, its line is wrong, the file
            cannot be read or written, or another change is under way.
    """
    log = state_dir / FILE_NAME
    if log.exists() and not _ended(log.read_text()) and _serves(state_dir):
        raise UserError("another server is joining or leaving; try again when that is done")
    file = HostsFile(hosts, default_platform())
    before = file.change(action, server)
    try:
        if not _serves(state_dir):
            print("no launcher uses this --state-dir; the next start reads the hosts file")
            return 0
        if _applied(state_dir):
            return 0
    except UserError:
        file.restore(before)
        raise
    file.restore(before)
    return 1


def _serves(state_dir: pathlib.Path) -> bool:
    """Whether a launcher uses the directory."""
    try:
        with sole_launcher(state_dir):
            return False
    except InUse:
        return True


def _ended(text: str) -> bool:
    """Whether the log of a change has its last line."""
    return any(line.startswith(END) for line in text.splitlines())


def _applied(state_dir: pathlib.Path) -> bool:
    """Have the launcher read the hosts file, and show what it does until it is done."""
    log = state_dir / FILE_NAME
    log.unlink(missing_ok=True)
    pid = launcher_pid(state_dir)
    if pid is None:
        raise UserError(f"--state-dir {state_dir}: the launcher has only begun to start; try again")
    os.kill(pid, signal.SIGHUP)
    line = ""
    for line in _lines(log, state_dir):
        print(line)
    return line.startswith(DONE)


def _lines(log: pathlib.Path, state_dir: pathlib.Path) -> Iterator[str]:
    """The lines of a change's log as they are written, up to the last."""
    shown, deadline = 0, time.monotonic() + BEGIN_S
    while True:
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        for line in lines[shown:]:
            if not line.endswith(("\n", "\r")):
                break
            shown += 1
            yield line.strip()
            if line.startswith(END):
                return
        if not _serves(state_dir):
            raise UserError("the launcher has ended")
        if not shown and time.monotonic() > deadline:
            raise UserError(f"the launcher has not begun with the change within {BEGIN_S:g} s")
        time.sleep(running.LOOK_S)
