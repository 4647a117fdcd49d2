"""The three servers, from outside: starts them on the hosts of a testbed and asks them all."""

from __future__ import annotations

import contextlib
import pathlib
import pickle
import secrets
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.namespaces import Testbed
from dance_jax.config import ClusterSpec
from dance_jax.launch.hosts import read_hosts
from dance_jax.models import native

from .server import Unanswered

ROOT = pathlib.Path(__file__).resolve().parents[2]


class ServerError(RuntimeError):
    """A server failed; the message has what it said."""


class Servers:
    """Processes on all hosts of a testbed, joined.

    Attributes:
        spec: the servers.
        transport: what carries rows between them.
    """

    def __init__(self, bed: Testbed, directory: pathlib.Path, *, delayed: bool = False):
        """
        Args:
            directory: for the C++ library and the servers' logs.
            delayed: the links can be given a delay (`set_delay`).
        """
        self.bed = bed
        self.spec: ClusterSpec = read_hosts(bed.write_hosts(measure=False))
        library, key = native.build(directory), secrets.token_bytes(32)
        self._logs = [directory / f"{name}.log" for name in self.spec.names]
        self._processes = [self._start(name) for name in self.spec.names]
        try:
            for rank in range(len(self._processes)):
                self._send(rank, (self.spec, rank, key, library))
            (coordinator, *_), endpoints = zip(*self.ask("prepare"), strict=True)
            joined = self.ask("join", coordinator=coordinator, endpoints=endpoints, delayed=delayed)
            (self.transport,) = set(joined)
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, **arguments: Any) -> list[Any]:
        """The answers of all servers, by rank, to a method of `server.Server`.

        Raises:
            ServerError: a server failed, or is gone.
        """
        for rank in range(len(self._processes)):
            self._send(rank, (method, arguments))
        return [self._receive(rank) for rank in range(len(self._processes))]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _start(self, host: str) -> subprocess.Popen:
        log = self._logs[self.spec.rank_of(host)]
        with log.open("ab") as errors:
            return self.bed.exec(
                host,
                [sys.executable, "-m", "benchmarks.layers.server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
            )

    def _send(self, rank: int, message: Any) -> None:
        stdin = self._processes[rank].stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_receive` says why
            pickle.dump(message, stdin)
            stdin.flush()

    def _receive(self, rank: int) -> Any:
        stdout = self._processes[rank].stdout
        assert stdout is not None
        try:
            reply = pickle.load(stdout)
        except EOFError:
            said = self._logs[rank].read_text(errors="replace")[-2000:]
            reply = Unanswered(f"its process ended: {said}")
        if isinstance(reply, Unanswered):
            raise ServerError(f"server {self.spec.names[rank]}: {reply.traceback}")
        return reply


@contextlib.contextmanager
def joined(bed: Testbed, directory: pathlib.Path, *, delayed: bool = False) -> Iterator[Servers]:
    """Servers that are ended with the block."""
    servers = Servers(bed, directory, delayed=delayed)
    try:
        yield servers
    finally:
        servers.close()
