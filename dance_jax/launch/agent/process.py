"""A server's process as its parent sees it: local or over ssh, with the reasons for its end."""

from __future__ import annotations

import contextlib
import os
import pathlib
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Protocol

from dance_jax.config import ServerSpec
from dance_jax.launch.agent.ssh import SSH_FAILED, server_command, server_environment

#: Lines of a dead server's log that the error quotes.
LOG_LINES = 25

#: Signs in a log or message that a process failed because another process was gone.
_ECHOES = (
    "gloo",
    "Connection reset by peer",
    "Connection closed by peer",
    "coordination service",
    "CoordinationService",
    "heartbeat",
    "another task died",
    "UNAVAILABLE",
    "closed the connection",
)


class ServerHandle(Protocol):
    """What a cluster needs of a server's process, whichever launcher started it."""

    name: str
    #: time.monotonic() when its end was noticed; when it reported a failure.
    ended: float | None
    failed: float | None
    #: Failure message of the process, and whether the user can fix the cause.
    failure: str | None
    user_failure: bool
    #: Process id on the server's machine; None: not known yet.
    pid: int | None

    def tell(self, line: bytes) -> None:
        """Give the process its setup."""
        ...

    def beat(self) -> None:
        """Send a sign of life, without which a server on another machine ends."""
        ...

    def let_go(self) -> None:
        """Close the input of the process, which makes the process end."""
        ...

    def kill(self, number: signal.Signals) -> None: ...

    def fate(self) -> str:
        """How the process ended, as text."""
        ...

    def last_lines(self) -> list[str]:
        """The last lines of the log."""
        ...

    @property
    def log(self) -> str:
        """Path of the whole log."""
        ...

    def echo(self) -> bool:
        """Whether the end looks like a consequence of another server's end."""
        ...


def sounds_like_echo(text: str) -> bool:
    """Whether the text of a failure or log says that another process was gone."""
    return any(sign.lower() in text.lower() for sign in _ECHOES)


def is_echo(failure: str | None, status: int | None, lines: Sequence[str]) -> bool:
    """Whether a process's end looks like a consequence of another server's end.

    Args:
        failure: the message of the process itself.
        status: exit status as in a shell; None: the process still runs.
        lines: the last lines of its log.
    """
    if failure is None and status is not None and status > 128:
        # JAX aborts a process whose job is broken.
        return status == 128 + signal.SIGABRT
    return sounds_like_echo(failure or "\n".join(lines))


def in_words(status: int) -> str:
    """Describe a shell's exit status.

    >>> in_words(137)
    'was killed by signal 9 (SIGKILL)'
    """
    with contextlib.suppress(ValueError):
        if status > 128:
            name = signal.Signals(status - 128).name
            return f"was killed by signal {status - 128} ({name})"
    return f"ended with exit status {status}"


class ServerProcess:
    """A process of `module` for a server, local or over ssh.

    Args:
        server: the server.
        log_path: file for the output of the process; None: the output of this process.
        module: dotted name.
        ssh_config: file for `ssh -F`.
        on_end: called, by a thread, when the process has ended.
    """

    def __init__(
        self,
        server: ServerSpec,
        log_path: pathlib.Path | None,
        module: str,
        ssh_config: pathlib.Path | None = None,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        self.name = server.name
        self.ended: float | None = None
        self.failed: float | None = None
        self.failure: str | None = None
        self.user_failure = False
        self.pid: int | None = None
        self._target = server.ssh
        self._log_path = log_path
        self._on_end = on_end
        with _log_file(log_path) as log:
            self.popen = subprocess.Popen(
                server_command(server, module, ssh_config),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(server),
                start_new_session=True,  # Ctrl-C in the terminal is for the parent only
            )
        if self._target is None:
            self.pid = self.popen.pid
        #: Lines to write to the input of the process; None closes it.
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        for work in (self._wait, self._feed):
            name = f"{work.__name__.strip('_')}-{self.name}"
            threading.Thread(target=work, daemon=True, name=name).start()

    def _wait(self) -> None:
        self.popen.wait()
        self.ended = time.monotonic()
        self._lines.put(None)
        self._on_end()

    @property
    def status(self) -> int | None:
        """Exit status as in a shell; None: the process still runs."""
        status = self.popen.poll()
        return status if status is None or status >= 0 else 128 - status

    def tell(self, line: bytes) -> None:
        """Write the setup; standard input stays open as a sign of life."""
        self._lines.put(line + b"\n")

    def beat(self) -> None:
        if self._target is not None:
            self._lines.put(b"\n")

    def let_go(self) -> None:
        self._lines.put(None)

    def _feed(self) -> None:
        """Write lines, in a thread: a setup is larger than a pipe and is read after the imports."""
        pipe = self.popen.stdin
        assert pipe is not None
        # The process may be dead, which is noticed elsewhere.
        with contextlib.suppress(BrokenPipeError), pipe:
            while (line := self._lines.get()) is not None:
                pipe.write(line)
                pipe.flush()

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the process (to ssh if it is remote) and all its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, number)

    def fate(self) -> str:
        if self.failure is not None:
            return f"failed: {self.failure}"
        if self.status is None:
            return "lost its connection to the launcher"
        if self._target is not None and self.status == SSH_FAILED:
            last = next((line for line in reversed(self.last_lines()) if line.strip()), "")
            why = f": {last.strip()}" if last.startswith(("ssh", "Connection", "Timeout")) else ""
            return f"is lost: the ssh connection to {self._target} broke{why}"
        if self._target is not None and self.popen.returncode < 0:
            return f"is lost: the ssh to {self._target} {in_words(self.status)}"
        return in_words(self.status)

    def last_lines(self) -> list[str]:
        if self._log_path is None:
            return []
        try:
            with open(self._log_path, "rb") as log:
                log.seek(max(0, os.path.getsize(self._log_path) - 16384))
                return log.read().decode(errors="replace").splitlines()[-LOG_LINES:]
        except OSError as error:
            return [f"(the log cannot be read: {error})"]

    @property
    def log(self) -> str:
        return str(self._log_path)

    def echo(self) -> bool:
        return is_echo(self.failure, self.status, self.last_lines())


@contextlib.contextmanager
def _log_file(path: pathlib.Path | None) -> Iterator[IO[bytes] | None]:
    if path is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        yield file
