"""A server's process as its parent sees it: here or behind ssh, and what is known of its end."""

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

#: Lines of a dead server's log in the error.
LOG_LINES = 25

#: In a log or message, signs that a process failed because another was gone.
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
    """What a cluster needs of a server's process, whoever started it."""

    name: str
    #: time.monotonic() of its end, as soon as it is noticed; of the failure it reported.
    ended: float | None
    failed: float | None
    #: What it said when it failed, and whether the user can do something about it.
    failure: str | None
    user_failure: bool
    #: On its own machine; None: not known yet.
    pid: int | None

    def tell(self, line: bytes) -> None:
        """Gives it its setup."""
        ...

    def beat(self) -> None:
        """A sign of life, which a server on another machine needs to live on."""
        ...

    def let_go(self) -> None:
        """Lets it end by itself: it does when nobody holds its input any more."""
        ...

    def kill(self, number: signal.Signals) -> None: ...

    def fate(self) -> str:
        """How it ended, in words."""
        ...

    def last_lines(self) -> list[str]:
        """The end of its log."""
        ...

    @property
    def log(self) -> str:
        """Where its whole log is."""
        ...

    def echo(self) -> bool:
        """It looks like a consequence of another server's end."""
        ...


def sounds_like_echo(text: str) -> bool:
    """The text of a failure or log says that another process was gone."""
    return any(sign.lower() in text.lower() for sign in _ECHOES)


def is_echo(failure: str | None, status: int | None, lines: Sequence[str]) -> bool:
    """A process's end looks like a consequence of another server's.

    Args:
        failure: what it said itself.
        status: exit status as a shell has it; None: it lives yet.
        lines: the end of its log.
    """
    if failure is None and status is not None and status > 128:
        # Aborting is how JAX ends a process whose job is broken.
        return status == 128 + signal.SIGABRT
    return sounds_like_echo(failure or "\n".join(lines))


def in_words(status: int) -> str:
    """What a shell's exit status says of a process.

    >>> in_words(137)
    'was killed by signal 9 (SIGKILL)'
    """
    with contextlib.suppress(ValueError):
        if status > 128:
            name = signal.Signals(status - 128).name
            return f"was killed by signal {status - 128} ({name})"
    return f"ended with exit status {status}"


class ServerProcess:
    """A process of `module` for a server, local or through ssh.

    Args:
        server: whose.
        log_path: file for all that it prints; None: it prints where this process does.
        module: dotted name.
        ssh_config: file for `ssh -F`.
        on_end: called, by a thread, when it has ended.
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
                start_new_session=True,  # Ctrl-C in the terminal is for the parent alone
            )
        if self._target is None:
            self.pid = self.popen.pid
        #: What is to be written to it; None: its input ends.
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
        """Exit status as a shell has it; None: it lives yet."""
        status = self.popen.poll()
        return status if status is None or status >= 0 else 128 - status

    def tell(self, line: bytes) -> None:
        """Writes its setup; standard input stays open as a sign of life."""
        self._lines.put(line + b"\n")

    def beat(self) -> None:
        if self._target is not None:
            self._lines.put(b"\n")

    def let_go(self) -> None:
        self._lines.put(None)

    def _feed(self) -> None:
        """A thread of its own: a setup is larger than a pipe, and is read once all is imported."""
        pipe = self.popen.stdin
        assert pipe is not None
        # It may be dead, which is noticed elsewhere.
        with contextlib.suppress(BrokenPipeError), pipe:
            while (line := self._lines.get()) is not None:
                pipe.write(line)
                pipe.flush()

    def kill(self, number: signal.Signals) -> None:
        """Sends a signal to the process (of ssh, if it is elsewhere) and everything it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, number)

    def fate(self) -> str:
        if self.failure is not None:
            return f"failed: {self.failure}"
        if self.status is None:
            return "was ended"
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
