"""Launches in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.request

import psutil


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def free_ports(count: int) -> int:
    """The first of so many TCP ports in a row that nobody uses at the moment."""
    for _ in range(100):
        first = free_port()
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError, OverflowError):
            for port in range(first, first + count):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError(f"no {count} free ports in a row")


def by_pid(processes: list[psutil.Process]) -> list[psutil.Process]:
    """In the order in which they were started."""
    return sorted(processes, key=lambda process: process.pid)


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    """All end within so long; the children of a parent that is frozen stay as zombies."""
    deadline = time.monotonic() + seconds
    while any(_lives(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)  # between two looks
    return True


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
        #: All processes that were seen.
        self.started: list[psutil.Process] = []

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str, seconds: float = 300) -> None:
        """Waits until the launch has printed something; notes its workers."""
        deadline = time.monotonic() + seconds
        while text not in self.text:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.05)
        self.note_workers()

    def note_workers(self) -> None:
        """The processes that serve: one for each server, and what they have started."""
        self.workers = by_pid(self.process.children())
        self.started = list({*self.started, *self.process.children(recursive=True)})

    def worker(self, rank: int) -> psutil.Process:
        """A server's process; they are started in the order of their ranks."""
        return self.workers[rank]

    def assert_nothing_left(self, seconds: float = 10) -> None:
        """No process, private file or port of the launch is left after so long."""
        _, alive = psutil.wait_procs(self.started, timeout=seconds)
        assert not alive
        assert list(self.private.iterdir()) == []

    def kill(self) -> None:
        for process in [*self.started, self.process]:
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        self.process.wait()


def completion(url: str) -> str:
    """What a server answers to a short question, greedily."""
    body = {"prompt": "Es war einmal", "max_tokens": 6, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["text"]
