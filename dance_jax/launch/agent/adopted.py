"""A front end that another launcher started, or whose ssh connection broke, and that still runs."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import time

from dance_jax.config import VACANT, ServerSpec
from dance_jax.launch.agent.command import ssh_command
from dance_jax.launch.agent.process import ServerProcess, tail
from dance_jax.launch.control.channel import RECONNECT_S

_PROCESSES = pathlib.Path("/proc")


class AdoptedProcess(ServerProcess):
    """A process that is reached over the control channel only.

    Args:
        server: the server.
        pid: process id on the server's machine; None: not known yet.
        log_path: its log on this machine.
        ssh_config: file for `ssh -F`.
        module: that the process runs.
    """

    beats = False

    def __init__(
        self,
        server: ServerSpec,
        pid: int | None,
        log_path: pathlib.Path,
        ssh_config: pathlib.Path | None,
        module: str,
    ) -> None:
        super().__init__(server.name, pid)
        self._module = module
        self.remote = server.ssh is not None
        self._server, self._log_path, self._ssh_config = server, log_path, ssh_config
        self.reached(True)

    def reached(self, connected: bool) -> None:
        """Record whether the process is connected; one on another machine ends with that."""
        now = time.monotonic()
        if self.ended is not None:
            return
        if not self.remote:
            self.ended = None if self.pid is not None and runs(self._module, self.pid) else now
        elif connected:
            self.unreachable = None
        elif self.unreachable is None:
            self.unreachable = now
        elif now - self.unreachable > RECONNECT_S:
            self.ended = now

    def answered(self, pid: int) -> None:
        """Record that the process runs, with this id."""
        self.pid, self.ended, self.unreachable = pid, None, None

    def write(self, line: bytes) -> None:
        """Its input has ended with the process that started it."""

    def let_go(self) -> None:
        """As `write`."""

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the process: its engine ends with it."""
        if self.pid is None:
            return
        if not self.remote:
            if runs(self._module, self.pid):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(self.pid, number)
            return
        assert self._server.ssh is not None
        command = ssh_command(self._server.ssh, self._ssh_config)
        where = _PROCESSES / str(self.pid) / "cmdline"
        subprocess.Popen(
            [*command, f"grep -qa {self._module} {where} && kill -{number.value} {self.pid}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def status(self) -> int | None:
        return None  # only a parent gets it

    def lost(self) -> str:
        if self.unreachable is not None:
            return "is lost: it cannot be reached any more"
        return "" if self.ended is None else "has ended"

    def last_lines(self) -> list[str]:
        return tail(self._log_path)

    @property
    def log_place(self) -> str:
        return str(self._log_path)


def nobody() -> AdoptedProcess:
    """The process of a vacant seat, which has ended."""
    return AdoptedProcess(VACANT, None, pathlib.Path(os.devnull), None, "")


def runs(module: str, pid: int) -> bool:
    """Whether a process of this machine has this id and runs `python -m module`.

    The id may be another program's by now.
    """
    if not _PROCESSES.is_dir():  # not every system tells
        try:
            os.kill(pid, 0)
        except OSError:
            return False
        return True
    try:
        command = (_PROCESSES / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False
    return module.encode() in command.split(b"\0")
