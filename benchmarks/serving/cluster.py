"""A cluster of this machine that is started for a run, and ended with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from dance_jax.config import ClusterSpec, UserError

from .http import Address, HttpError, request

LAUNCHER = (sys.executable, "-m", "dance_jax.launch")
ROOT = pathlib.Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
#: Ports are looked for from here on: below those that systems give out by themselves.
FIRST_PORT, LAST_PORT = 8100, 32000
#: Seconds until the servers are ready, until they have ended after SIGTERM, between two questions.
READY_S, END_S, ASK_S = 900.0, 60.0, 0.2
#: Of its output, where it is shown.
TAIL_BYTES = 3000


class ClusterError(RuntimeError):
    """The cluster did not start, or ended too early; the message has what it said."""


class Cluster:
    """A launcher and its servers.

    Attributes:
        addresses: where the servers listen.
        pid: of the launcher.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], log: pathlib.Path, addresses: Sequence[Address]
    ) -> None:
        self.addresses = tuple(addresses)
        self.pid = process.pid
        self._process = process
        self._log = log

    async def ready(self) -> None:
        """Returns when all servers answer requests.

        Raises:
            ClusterError: the launcher ended, or it takes too long.
        """
        try:
            async with asyncio.timeout(READY_S):
                for address in self.addresses:
                    while not await _is_ready(address):
                        self.check()
                        await asyncio.sleep(ASK_S)
        except TimeoutError:
            raise ClusterError(
                f"the servers are not ready after {READY_S:g} s:\n{self._said()}"
            ) from None

    def check(self) -> None:
        """
        Raises:
            ClusterError: the launcher has ended.
        """
        if self._process.poll() is not None:
            raise ClusterError(
                f"the launcher ended with code {self._process.returncode}:\n{self._said()}"
            )

    def stop(self) -> None:
        """Ends the launcher, which ends its servers; at once when this is interrupted."""
        self._process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        finally:
            # Its servers end themselves when it is gone.
            self._process.kill()
            self._process.wait()

    def _said(self) -> str:
        return self._log.read_bytes()[-TAIL_BYTES:].decode(errors="replace").strip()


@contextlib.contextmanager
def started(
    spec: ClusterSpec,
    arguments: Sequence[str],
    addresses: Sequence[Address] | None = None,
    root: pathlib.Path = ROOT,
) -> Iterator[Cluster]:
    """Starts the servers; they end with the block, however it ends.

    Args:
        arguments: of the launcher, without its port.
        addresses: where they will listen, all at the first one's port or the next ones; None: on
            free ports of this machine.
        root: of the checkout whose launcher and servers run.

    Raises:
        UserError: a server is on another machine, and no addresses are given.
    """
    elsewhere = [server.name for server in spec.servers if server.ssh is not None]
    if elsewhere and addresses is None:
        raise UserError(
            f"{', '.join(elsewhere)}: on another machine; start the cluster yourself, with --bind, "
            "and give --url of each server"
        )
    if addresses is None:
        port = free_ports(len(spec.servers))
        addresses = [Address(LOOPBACK, port + n) for n in range(len(spec.servers))]
    with tempfile.TemporaryDirectory(prefix="dance-jax-serve-") as work:
        log = pathlib.Path(work) / "launcher.log"
        command = [*LAUNCHER, *arguments, "--port", str(addresses[0].port)]
        with log.open("wb") as file:
            # In a session of its own: Ctrl-C reaches this process alone, which then ends it.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                cwd=root,
                # A testbed's ssh hands PYTHONPATH on to the hosts.
                env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(root)},
            )
        cluster = Cluster(process, log, addresses)
        try:
            yield cluster
        finally:
            cluster.stop()


def free_ports(count: int) -> int:
    """The first of some neighbouring ports that are free now.

    Raises:
        UserError: there are none.
    """
    for first in range(FIRST_PORT, LAST_PORT, count):
        if all(_is_free(first + n) for n in range(count)):
            return first
    raise UserError(f"no {count} neighbouring ports are free on {LOOPBACK}")


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
