"""A cluster on this machine that is started for a run and ends with the run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

from dance_jax.bench.http import Address, HttpError, request
from dance_jax.config import ClusterSpec, UserError

LAUNCHER = (sys.executable, "-m", "dance_jax.launch")
LOOPBACK = "127.0.0.1"
#: Range in which free ports are searched: below the ephemeral ports of common systems.
FIRST_PORT, LAST_PORT = 8100, 32000
#: Seconds within which the servers must be ready, and must end after SIGTERM; seconds between two
#: readiness checks.
READY_S, END_S, ASK_S = 900.0, 60.0, 0.2
#: Bytes at the end of the launcher's output to show in errors.
TAIL_BYTES = 3000


class RunError(RuntimeError):
    """A run failed: its servers did not start, ended too early or did not answer as they must."""


class StartedCluster:
    """A cluster that was started for a run: a launcher and its servers.

    Attributes:
        addresses: where the servers listen.
        pid: of the launcher.
    """

    def __init__(
        self,
        launch: Callable[[], subprocess.Popen[bytes]],
        log: pathlib.Path,
        addresses: Sequence[Address],
    ) -> None:
        self.addresses = tuple(addresses)
        self._launch = launch
        self._process = launch()
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    async def launch_again(self) -> None:
        """Start the launcher again, which was killed; returns once it has taken over the servers.

        Raises:
            RunError: the launcher ended, or has not taken over within READY_S.
        """
        self._process.wait()
        before = self._log.stat().st_size
        self._process = self._launch()
        async with asyncio.timeout(READY_S):
            while b"Ctrl-C finishes" not in self._log.read_bytes()[before:]:
                self.check()
                await asyncio.sleep(ASK_S)

    async def ready(self) -> None:
        """Wait until all servers are ready.

        Raises:
            RunError: the launcher ended, or a server is not ready within READY_S.
        """
        try:
            async with asyncio.timeout(READY_S):
                for address in self.addresses:
                    while not await _is_ready(address):
                        self.check()
                        await asyncio.sleep(ASK_S)
        except TimeoutError:
            raise RunError(
                f"the servers are not ready after {READY_S:g} s:\n{self._tail()}"
            ) from None

    def check(self) -> None:
        """Check that the launcher runs.

        Raises:
            RunError: the launcher has ended.
        """
        if self._process.poll() is not None:
            raise RunError(
                f"the launcher ended with code {self._process.returncode}:\n{self._tail()}"
            )

    def stop(self) -> None:
        """End the launcher, which ends its servers; kill it at once if the wait is interrupted."""
        self._process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        finally:
            # The servers end by themselves when the launcher is gone.
            self._process.kill()
            self._process.wait()

    def _tail(self) -> str:
        """Return the end of the launcher's output."""
        return self._log.read_bytes()[-TAIL_BYTES:].decode(errors="replace").strip()


@contextlib.contextmanager
def started(
    spec: ClusterSpec,
    arguments: Sequence[str],
    addresses: Sequence[Address] | None = None,
    root: pathlib.Path | None = None,
    elsewhere: Callable[[Sequence[str]], Sequence[str]] = lambda command: command,
) -> Iterator[StartedCluster]:
    """Run the servers for the block; they end however the block ends.

    Args:
        spec: the servers.
        arguments: of the launcher, without --port.
        addresses: where the servers will listen: on different hosts at the first address's port,
            or on one host at that port and the following ones. If None, on free ports of this
            machine.
        root: the checkout whose launcher and servers run, with this working directory. If None,
            the installed package, with the working directory of this process.
        elsewhere: makes, of the launcher's command, the one that runs it where it shall run.

    Raises:
        UserError: a server is on another machine, and no addresses are given.
    """
    remote = [server.name for server in spec.servers if server.ssh is not None]
    if remote and addresses is None:
        raise UserError(
            f"{', '.join(remote)}: on another machine; start the cluster yourself with --bind "
            "and give each server's URL"
        )
    if addresses is None:
        port = first_free_port(len(spec.servers))
        addresses = [Address(LOOPBACK, port + n) for n in range(len(spec.servers))]
    with tempfile.TemporaryDirectory(prefix="dance-jax-bench-") as work:
        log = pathlib.Path(work) / "launcher.log"
        command = elsewhere([*LAUNCHER, *arguments, "--port", str(addresses[0].port)])

        def launch() -> subprocess.Popen[bytes]:
            with log.open("ab") as file:
                # In its own session: Ctrl-C reaches only this process, which then ends the
                # launcher.
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                    cwd=root,
                    # On a testbed, ssh passes PYTHONPATH on to the hosts.
                    env=os.environ
                    | {"PYTHONUNBUFFERED": "1"}
                    | ({} if root is None else {"PYTHONPATH": str(root)}),
                )

        cluster = StartedCluster(launch, log, addresses)
        try:
            yield cluster
        finally:
            cluster.stop()


def first_free_port(count: int) -> int:
    """Return the first of `count` consecutive ports that are free now.

    Raises:
        UserError: no such ports are free.
    """
    for first in range(FIRST_PORT, LAST_PORT - count + 1, count):
        if all(_is_free(first + n) for n in range(count)):
            return first
    raise UserError(
        f"no {count} consecutive ports from {FIRST_PORT} to {LAST_PORT} are free on {LOOPBACK}: "
        "stop programs that use these ports"
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


async def _is_ready(address: Address) -> bool:
    try:
        async with request(address, "GET", "/ready") as response:
            return response.status == 200
    except HttpError:
        return False
