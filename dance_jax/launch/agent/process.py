"""A process on a server's machine as its parent sees it, with the reasons for its end."""

from __future__ import annotations

import abc
import collections
import contextlib
import os
import pathlib
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from dance_jax.config import ServerSpec, UserError
from dance_jax.launch.agent.command import SSH_FAILED, server_command, server_environment

#: Precedes every answer of a process, because a login shell may print its own text first.
MARK = b"dance_jax answer: "
#: Seconds until a killed process must have ended.
_KILLED_S = 5.0
#: Lines of a dead server's log that the error quotes.
LOG_LINES = 25
#: Bytes at the end of a log that are read for them.
_TAIL_BYTES = 1 << 14

#: Texts showing that a process failed only because another one was gone.
_CONSEQUENCES = (
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


class ServerProcess(abc.ABC):
    """A process of one of this package's modules on a server's machine.

    The process reads lines and ends when its input ends or its parent dies. `ChildProcess` starts
    it here or over ssh; for `nodes.NodeProcess` the launcher of another node starts it.

    Args:
        name: of the server.
        pid: process id on the server's machine; None if not known yet.
    """

    #: Started over ssh or by another node: local paths and loopback addresses do not apply there.
    remote: bool
    #: The process ends if it gets no signs of life (`beat`).
    beats: bool

    def __init__(self, name: str, pid: int | None = None) -> None:
        self.name = name
        self.pid = pid
        #: time.monotonic() when the end was noticed; None while the process runs.
        self.ended: float | None = None
        #: time.monotonic() since when it cannot be reached, though it may run; None if it can.
        self.unreachable: float | None = None
        #: time.monotonic() when it reported a failure; None if it has not.
        self.failed: float | None = None
        #: Failure message of the process; None if it has reported none.
        self.failure: str | None = None
        #: Whether the user can fix the cause of that failure.
        self.user_failure = False
        #: Unread answers; a None marks the end of the output.
        self.answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    @abc.abstractmethod
    def write(self, line: bytes) -> None:
        """Write a line to the input of the process; returns at once."""

    def beat(self) -> None:
        """Send a sign of life if the process needs one."""
        if self.beats:
            self.write(b"")

    @abc.abstractmethod
    def let_go(self) -> None:
        """Close the input of the process, which makes the process end."""

    @abc.abstractmethod
    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the process and its children."""

    def read(self, timeout_s: float) -> bytes | None:
        """The next answer of a process that answers; None if its output has ended.

        Raises:
            TimeoutError: there was no answer within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(queue.Empty):
                return self.answers.get(timeout=self._receive(deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no answer within {timeout_s:.0f} s")

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the process; returns False if it has not ended in time."""
        deadline = time.monotonic() + seconds
        while self.ended is None and time.monotonic() < deadline:
            time.sleep(min(self._receive(deadline - time.monotonic()), 0.01))
        return self.ended is not None

    def _receive(self, seconds: float) -> float:
        """Receive messages, in subclasses without reader threads, for at most `seconds`.

        Returns:
            Seconds the caller may still block.
        """
        return max(0.0, seconds)

    def end(self, grace_s: float) -> None:
        """End the process, by force after `grace_s`."""
        self.let_go()
        self.wait(grace_s)
        # Even after the end, because children may outlive the process.
        self.kill(signal.SIGKILL)
        self.wait(_KILLED_S)

    @property
    @abc.abstractmethod
    def status(self) -> int | None:
        """Exit status as in a shell; None if the process still runs or its status is unknown."""

    @abc.abstractmethod
    def lost(self) -> str:
        """Why the process can no longer be reached.

        Empty if it runs, or if its exit status explains its end.
        """

    def fate(self) -> str:
        """How the process ended, as text."""
        if self.failure is not None:
            return f"failed: {self.failure}"
        if lost := self.lost():
            return lost
        if self.status is None:
            return "lost its connection to the launcher"
        return in_words(self.status)

    @abc.abstractmethod
    def last_lines(self) -> list[str]:
        """The last lines of the log."""

    @property
    @abc.abstractmethod
    def log_place(self) -> str:
        """Path of the whole log, or the node it is on."""

    def ended_as_consequence(self) -> bool:
        """Whether the end looks like a consequence of another server's end."""
        return is_consequence(self.failure, self.status, self.last_lines())


def is_consequence(failure: str | None, status: int | None, lines: Sequence[str]) -> bool:
    """Whether a process's end looks like a consequence of another server's end.

    Args:
        failure: the message of the process itself.
        status: exit status as in a shell; None if the process still runs.
        lines: the last lines of its log.
    """
    if failure is None and status is not None and status > 128:
        # JAX aborts a process whose job is broken.
        return status == 128 + signal.SIGABRT
    said = (failure or "\n".join(lines)).lower()
    return any(text.lower() in said for text in _CONSEQUENCES)


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


class ChildProcess(ServerProcess):
    """A child process: the module, or the ssh client that runs it.

    Args:
        server: the server; its ssh= and python= say how the module is run.
        module: dotted name.
        log_path: file for the output of the process; None: the output of this process.
        ssh_config: file for `ssh -F`.
        answers: the process answers on its output with lines that begin with MARK; no log is
            written; the last LOG_LINES other lines are kept in memory.
        private: directory that the child removes if its parent is killed.
        on_change: called, by a thread, when an answer has arrived and when the process has ended.

    Raises:
        UserError: the program cannot be started, or the log cannot be written.
    """

    def __init__(
        self,
        server: ServerSpec,
        module: str,
        *,
        log_path: pathlib.Path | None = None,
        ssh_config: pathlib.Path | None = None,
        answers: bool = False,
        private: str = "",
        on_change: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(server.name)
        self.remote = self.beats = server.ssh is not None
        self._target = server.ssh
        self._log_path = log_path
        self._on_change = on_change
        self._other_lines: collections.deque[str] = collections.deque(maxlen=LOG_LINES)
        command = server_command(server, module, ssh_config)
        try:
            with _log_file(log_path) as log:
                self.popen = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if answers else log,
                    stderr=subprocess.PIPE if answers else subprocess.STDOUT,
                    env=server_environment(server, private),
                    start_new_session=True,  # Ctrl-C in the terminal is for the parent only
                )
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise UserError(f"{command[0]} cannot be started: {why}") from error
        if self._target is None:
            self.pid = self.popen.pid
        #: Lines to write to the input of the process; None closes it.
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._readers = [self._thread(self._read, pipe) for pipe in self._outputs()]
        self._thread(self._feed)
        self._thread(self._await_end)

    def _thread(self, work: Callable[..., None], *arguments: object) -> threading.Thread:
        name = f"{work.__name__.strip('_')}-{self.name}"
        thread = threading.Thread(target=work, args=arguments, daemon=True, name=name)
        thread.start()
        return thread

    def _outputs(self) -> list[IO[bytes]]:
        return [pipe for pipe in (self.popen.stdout, self.popen.stderr) if pipe is not None]

    def _await_end(self) -> None:
        self.popen.wait()
        # Children of a dead process may hold its output open.
        for reader in self._readers:
            reader.join(0.5)
        self.ended = time.monotonic()
        self._lines.put(None)
        self._on_change()

    @property
    def status(self) -> int | None:
        status = self.popen.poll()
        return status if status is None or status >= 0 else 128 - status

    def write(self, line: bytes) -> None:
        self._lines.put(line + b"\n")

    def let_go(self) -> None:
        self._lines.put(None)

    def _feed(self) -> None:
        """Write lines to the child's input.

        In a thread, because a setup exceeds the pipe's buffer and the child reads it only after its
        imports.
        """
        pipe = self.popen.stdin
        assert pipe is not None
        # The process may be dead, which is noticed elsewhere.
        with contextlib.suppress(BrokenPipeError), pipe:
            while (line := self._lines.get()) is not None:
                pipe.write(line)
                pipe.flush()

    def _read(self, pipe: IO[bytes]) -> None:
        """Read the answers and other lines of an output until it ends."""
        with pipe:
            for line in pipe:
                if line.startswith(MARK):
                    self.answers.put(line.removeprefix(MARK))
                    self._on_change()
                else:
                    self._other_lines.append(line.decode(errors="replace").rstrip("\n"))
        if pipe is self.popen.stdout:
            self.answers.put(None)

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the process (to ssh if it is remote) and all its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, number)

    def lost(self) -> str:
        if self._target is None or self.status is None:
            return ""
        if self.status == SSH_FAILED:
            last = next((line for line in reversed(self.last_lines()) if line.strip()), "")
            why = f": {last.strip()}" if last.startswith(("ssh", "Connection", "Timeout")) else ""
            return f"is lost: the ssh connection to {self._target} broke{why}"
        if self.popen.returncode < 0:
            return f"is lost: the ssh to {self._target} {in_words(self.status)}"
        return ""

    def last_lines(self) -> list[str]:
        if self._log_path is None:
            return list(self._other_lines)
        return tail(self._log_path)

    @property
    def log_place(self) -> str:
        return str(self._log_path)


def tail(path: pathlib.Path) -> list[str]:
    """The last LOG_LINES lines of a log, or why it cannot be read."""
    try:
        with open(path, "rb") as log:
            log.seek(max(0, os.path.getsize(path) - _TAIL_BYTES))
            # A device such as /dev/full has no end.
            return log.read(_TAIL_BYTES).decode(errors="replace").splitlines()[-LOG_LINES:]
    except OSError as error:
        return [f"(the log cannot be read: {error})"]


def remove_log(path: pathlib.Path) -> None:
    """Remove the log of an earlier launch, if there is one.

    Raises:
        UserError: it cannot be removed; a directory, for example.
    """
    with _writable(path):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _log_file(path: pathlib.Path | None) -> Iterator[IO[bytes] | None]:
    if path is None:
        yield None
        return
    with _writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A server that is started again goes on with its log.
        file = open(path, "ab")  # noqa: SIM115
    with file:
        yield file


@contextlib.contextmanager
def _writable(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise UserError(
            f"{path}: the log cannot be written: {why}; name another --log-dir"
        ) from error
