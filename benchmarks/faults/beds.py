"""A service under load: its processes, its placement, and on a testbed its hosts."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
import random
import subprocess
from collections.abc import Iterator, Sequence

import psutil

from benchmarks.namespaces import Testbed
from dance_jax.bench.cluster import RunError, StartedCluster
from dance_jax.bench.http import Address, HttpError, request

FRONT, ENGINE = "dance_jax.serve.frontend", "dance_jax.launch.worker.main"
#: Experts that each of two servers gives to the other in a forced migration.
MOVED = 24
#: Seconds for an answer about the service itself; for a decision, whose process has low priority.
ANSWER_S, DECIDE_S = 5.0, 300.0


class Bed(abc.ABC):
    """A running service.

    Args:
        cluster: the service, as started.
        names: of the servers, by rank.
    """

    def __init__(self, cluster: StartedCluster, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._cluster = cluster
        self.launch_again = cluster.launch_again

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where the servers listen, by rank."""
        return self._cluster.addresses

    @property
    def launcher(self) -> psutil.Process:
        """The launcher, as it runs now."""
        return psutil.Process(self._cluster.pid)

    @abc.abstractmethod
    def front(self, rank: int) -> psutil.Process:
        """A server's front end.

        Raises:
            RunError: it has none.
        """

    @abc.abstractmethod
    def listening(self) -> list[str]:
        """Ports of the service at which some process listens."""

    def engine(self, rank: int) -> psutil.Process:
        """A server's engine.

        Raises:
            RunError: it has none.
        """
        for process in self.front(rank).children():
            if _runs(process, ENGINE):
                return process
        raise RunError(f"{self.names[rank]}: its front end has no engine")

    def processes(self) -> set[psutil.Process]:
        """All processes of the service that are reached from its launcher and front ends."""
        roots = [self.launcher]
        for rank in range(len(self.names)):
            with contextlib.suppress(RunError):
                roots.append(self.front(rank))
        found = set(roots)
        for root in roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.update(root.children(recursive=True))
        return found

    def memory(self) -> dict[str, int]:
        """Bytes of resident memory of the launcher and of each front end."""
        named = {"launcher": self.launcher}
        named |= {name: self.front(rank) for rank, name in enumerate(self.names)}
        return {name: process.memory_info().rss for name, process in named.items()}

    async def whole(self) -> bool:
        """Whether every server runs and knows that all others do."""
        self._cluster.check()
        for rank in range(len(self.names)):
            try:
                await self._ask(rank, "GET", "/ready")
                if (await self._ask(rank, "GET", "/health"))["lost"]:
                    return False
            except (HttpError, TimeoutError):
                return False
        return True

    async def residents(self, rank: int) -> list[list[set[int]]]:
        """[server][layer], the experts there, as one of the servers knows it."""
        servers = (await self._ask(rank, "GET", "/placement"))["servers"]
        return [[set(layer) for layer in server["resident"]] for server in servers]

    async def covered(self, hit: Sequence[int]) -> bool:
        """Whether every expert of these servers is on another one, too."""
        residents = await self.residents(0)
        others = [each for rank, each in enumerate(residents) if rank not in hit]
        return all(
            layer <= set().union(*(other[number] for other in others))
            for rank in hit
            for number, layer in enumerate(residents[rank])
        )

    async def migrate(self, rank: int, chance: random.Random) -> int:
        """Have two servers exchange experts; return how many experts have to be loaded.

        Args:
            rank: of the server that is asked.
            chance: chooses the servers and the experts.
        """
        residents = await self.residents(rank)
        one, two = chance.sample(range(len(residents)), 2)
        ways = (one, two), (two, one)
        only = [_only(residents[source], residents[target]) for source, target in ways]
        number = min(MOVED, *map(len, only))
        for (source, target), experts in zip(ways, only, strict=True):
            for layer, expert in chance.sample(experts, number):
                residents[source][layer].discard(expert)
                residents[target][layer].add(expert)
        servers = [
            {"name": name, "resident": [sorted(layer) for layer in layers]}
            for name, layers in zip(self.names, residents, strict=True)
        ]
        wish = {"servers": servers}
        decision = await self._ask(rank, "POST", "/placement/rebalance", wish, DECIDE_S)
        return decision["experts_moved"]

    async def _ask(
        self,
        rank: int,
        method: str,
        path: str,
        content: object = None,
        seconds: float = ANSWER_S,
    ) -> dict:
        body = b"" if content is None else json.dumps(content).encode()
        async with (
            asyncio.timeout(seconds),
            request(self.addresses[rank], method, path, body) as response,
        ):
            answer = await response.read()
            if response.status != 200:
                raise HttpError(f"{path}: {response.status}: {answer.decode(errors='replace')}")
            return json.loads(answer)


class Loopback(Bed):
    """A service whose servers are all on this machine."""

    def front(self, rank: int) -> psutil.Process:
        for process in psutil.process_iter():
            if _runs(process, FRONT) and self.addresses[rank].port in _ports(process):
                return process
        raise RunError(f"{self.names[rank]}: no front end listens at {self.addresses[rank]}")

    def listening(self) -> list[str]:
        ports = {address.port for address in self.addresses}
        taken = {port for process in psutil.process_iter() for port in _ports(process)}
        return [str(port) for port in sorted(ports & taken)]


class Hosts(Bed):
    """A service on the hosts of a testbed; its launcher runs on the first.

    Args:
        cluster, names: as for `Bed`.
        testbed: whose hosts have the servers' names.
        agents: by name, the command of a host's own launcher (--node-rank); empty: over ssh.
    """

    def __init__(
        self,
        cluster: StartedCluster,
        names: Sequence[str],
        testbed: Testbed,
        agents: dict[str, list[str]],
    ) -> None:
        super().__init__(cluster, names)
        self.testbed = testbed
        self._commands = agents
        self._agents: list[subprocess.Popen[bytes]] = []
        for name in agents:
            self._start_agent(name)

    def front(self, rank: int) -> psutil.Process:
        for pid in self.testbed.host_processes(self.names[rank]):
            with contextlib.suppress(psutil.NoSuchProcess):
                if _runs(process := psutil.Process(pid), FRONT):
                    return process
        raise RunError(f"{self.names[rank]}: the host has no front end")

    def listening(self) -> list[str]:
        return [f"{name}:{port}" for name in self.names for port in self._ports(name) if port != 22]

    def crash(self, rank: int) -> None:
        """Kill all processes of a host."""
        self.testbed.crash(self.names[rank])

    def boot(self, rank: int) -> None:
        """Start what a host starts when it boots."""
        name = self.names[rank]
        self.testbed.boot(name)
        if name in self._commands:
            self._start_agent(name)

    def close(self) -> None:
        """End the hosts' own launchers."""
        for agent in self._agents:
            agent.kill()
            agent.wait()

    def _start_agent(self, name: str) -> None:
        command = self.testbed.command(name, self._commands[name])
        self._agents.append(
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    def _ports(self, name: str) -> Iterator[int]:
        """The TCP ports at which processes of a host listen."""
        show = self.testbed.command(name, ["cat", "/proc/net/tcp", "/proc/net/tcp6"])
        for line in subprocess.run(show, capture_output=True, text=True).stdout.splitlines():
            _, local, _, state, *_ = line.split()
            if state == "0A":
                yield int(local.rpartition(":")[2], 16)


def _only(source: list[set[int]], target: list[set[int]]) -> list[tuple[int, int]]:
    """The (layer, expert) that the source has and the target has not."""
    return [
        (layer, expert)
        for layer, (mine, theirs) in enumerate(zip(source, target, strict=True))
        for expert in sorted(mine - theirs)
    ]


def _runs(process: psutil.Process, module: str) -> bool:
    """Whether a process is Python that runs this module."""
    try:
        name, *words = process.cmdline() or [""]
    except psutil.Error:
        return False
    return "python" in name and words[-2:] == ["-m", module]


def _ports(process: psutil.Process) -> set[int]:
    with contextlib.suppress(psutil.Error):
        return {each.laddr.port for each in process.net_connections() if each.status == "LISTEN"}
    return set()
