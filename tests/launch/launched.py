"""Runs launches in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterable
from typing import TypeVar

import psutil

_Result = TypeVar("_Result")


def eventually(look: Callable[[], _Result], seconds: float = 60) -> _Result:
    """The first true result of calling `look` repeatedly; after `seconds` the last result."""
    deadline = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def free_ports(count: int) -> int:
    """The first of `count` consecutive TCP ports that are free at the moment.

    The ports are below the range from which Linux hands out arbitrary ports (32768 and up), so none
    is handed out before the server that is told to use it binds it.
    """
    for first in random.SystemRandom().sample(range(10_000, 32_000), 100):
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError(f"no {count} free ports in a row")


def in_order(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The processes in order of start. Process ids alone do not tell: they wrap around."""
    return sorted(processes, key=lambda process: (process.create_time(), process.pid))


def gone(processes: Iterable[psutil.Process], seconds: float) -> bool:
    """Whether all end within `seconds`. Children of a frozen parent remain as zombies."""
    return eventually(lambda: not any(map(_lives, processes)), seconds)


def only_child(process: psutil.Process) -> psutil.Process:
    """Waits until exactly one child lives, apart from the process that renders chat templates.

    Between two engines a front end may have 0 or 2.
    """

    def look() -> psutil.Process | None:
        living = [
            child for child in process.children() if _lives(child) and not _renders_chats(child)
        ]
        return living[0] if len(living) == 1 else None

    child = eventually(look)
    assert child is not None, f"{process} has not one child but {process.children()}"
    return child


def _renders_chats(process: psutil.Process) -> bool:
    try:
        return any(word.endswith("chat_renderer.py") for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """Kills the processes that still live; the end of one may end others."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Launch:
    """A launch in a process of its own, with its workers and its private directory."""

    def __init__(self, command: list[str], folder: pathlib.Path) -> None:
        self.private = folder / "tmp"
        self.private.mkdir()
        self.output = folder / "terminal"
        environment = os.environ | {"TMPDIR": str(self.private), "COLUMNS": "120"}
        with open(self.output, "wb") as output:
            self.process = psutil.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        self.workers: list[psutil.Process] = []
        #: All processes seen so far.
        self.started: list[psutil.Process] = []

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str, seconds: float = 300) -> None:
        """Waits until the launch has printed `text`, then notes its workers."""
        ended = self.process.poll
        eventually(lambda: text in self.text or ended() is not None, seconds)
        assert text in self.text, self.text
        self.note_workers()

    def note_workers(self) -> None:
        """Notes the processes that serve: one per server, and what each has started.

        Processes that the launch starts later, to solve placements, come after the servers.
        """
        self.workers = in_order(self.process.children())
        self.started = list({*self.started, *self.process.children(recursive=True)})

    def worker(self, rank: int) -> psutil.Process:
        """A server's process. Servers are started in the order of their ranks."""
        return self.workers[rank]

    def assert_nothing_left(self, seconds: float = 10) -> None:
        """Asserts that after `seconds` no process, private file or port of the launch is left."""
        _, alive = psutil.wait_procs(self.started, timeout=seconds)
        assert not alive
        assert list(self.private.iterdir()) == []

    def kill(self) -> None:
        kill_all([*self.started, self.process])
        self.process.wait()


def completion(url: str) -> str:
    """A server's greedy answer to a short question."""
    body = {"prompt": "Es war einmal", "max_tokens": 6, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["text"]
