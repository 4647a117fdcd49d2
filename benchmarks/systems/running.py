"""The systems, started on the hosts of a testbed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import BinaryIO, Protocol

from benchmarks.live.places import Place
from benchmarks.namespaces import Testbed
from benchmarks.programs.child import processor_seconds
from benchmarks.programs.llama_cpp import LlamaCpp
from benchmarks.programs.models import Model
from benchmarks.serving.client import Api
from benchmarks.serving.cluster import LOOPBACK, ClusterError, free_ports
from benchmarks.serving.http import Address, HttpError, request

#: Formats that both sides have.
FORMATS = ("float32", "int8")
#: Slots of each device: 1.32 times the experts of the 200 M model on four devices.
SLOTS = 148
#: Users that the star serves at once, and tokens of the cache that they share.
STAR_USERS, STAR_TOKENS = 12, 4096
RPC_PORT = 50052
#: Seconds until the star must be ready, and between two questions.
READY_S, ASK_S = 300.0, 0.1


def about(model: Model, form: str) -> list[str]:
    """Options of `launch` that say which model is served, in a format of FORMATS."""
    words = ["--model", str(model.named()), "--cache-dir", str(model.work / "cache")]
    return words if form == "float32" else [*words, "--experts", form, "--trunk", form]


class Running:
    """A system that answers requests.

    Args:
        api: its servers, one for each host.
        bed: where it runs.
        pids: its processes on the hosts and the head.
    """

    def __init__(self, api: Api, bed: Testbed, pids: Iterable[int]) -> None:
        self.api = api
        self._bed, self._pids = bed, tuple(pids)

    def processor_s(self) -> float:
        """Seconds of processor time so far.

        Raises:
            ClusterError: a process has ended.
        """
        try:
            return sum(map(processor_seconds, self._pids))
        except FileNotFoundError:
            raise ClusterError("a process of a system has ended while it was measured") from None

    def interface_bytes(self) -> int:
        """Sent and received through the hosts' interfaces so far, by whatever system."""
        return sum(map(sum, self._bed.counters().values()))


class System(Protocol):
    """What can be started."""

    @property
    def name(self) -> str: ...

    @property
    def formats(self) -> tuple[str, ...]:
        """Some of FORMATS."""
        ...

    def serving(
        self, bed: Testbed, model: Model, form: str
    ) -> contextlib.AbstractContextManager[Running]:
        """The system with a model in one of its formats; it ends with the block."""
        ...


@dataclasses.dataclass(frozen=True)
class Dance:
    """This project.

    Attributes:
        name: of the system.
        policy: of placement.
        root: of the checkout.
        port: of all servers.
    formats: that it has; old versions read models as they are.
    """

    name: str
    policy: str
    activations: pathlib.Path
    root: pathlib.Path
    port: int
    formats: tuple[str, ...] = FORMATS

    @contextlib.contextmanager
    def serving(self, bed: Testbed, model: Model, form: str) -> Iterator[Running]:
        words = about(model, form)
        words += ["--policy", self.policy, "--activations", str(self.activations)]
        words += ["--rebalance-interval", "0"]
        hosts = bed.write_hosts(measure=False)
        before = bed.processes().keys()
        with Place(hosts, bed, self.root, self.port).serving(words) as cluster:
            asyncio.run(cluster.ready())
            api = Api(
                cluster.addresses, model.named().name, model.fields["max_position_embeddings"]
            )
            yield Running(api, bed, bed.processes().keys() - before)


@dataclasses.dataclass(frozen=True)
class Star:
    """llama.cpp's server, whose layers rpc-servers compute.

    Attributes:
        directory: of its programs.
    """

    directory: pathlib.Path
    name: str = "star"
    formats: tuple[str, ...] = FORMATS

    @contextlib.contextmanager
    def serving(self, bed: Testbed, model: Model, form: str) -> Iterator[Running]:
        address = Address(LOOPBACK, free_ports(1))
        layers = [Address(host.address, RPC_PORT) for host in bed.hosts.values()]
        before = bed.processes().keys()
        with contextlib.ExitStack() as stack:
            log = stack.enter_context((bed.state / "star.log").open("w+b"))
            # The rpc-servers would outlive their logins.
            stack.callback(self._kill, bed, before)
            rates = dict(bed.rates)
            # Weights are sent to the rpc-servers; that is not measured.
            bed.set_rate(None)
            for host, listens in zip(bed.hosts, layers, strict=True):
                rpc = ["exec", str(self.directory / "ggml-rpc-server"), "-H", listens.host]
                rpc += ["-p", str(listens.port), "-t", "1"]
                login = ["ssh", "-F", str(bed.ssh_config), host, shlex.join(rpc)]
                _start(login, listens, log)
            # This process is on the head, and so is the server.
            devices = [host.devices for host in bed.hosts.values()]
            file = model.gguf(LlamaCpp.formats[form])
            _start(self._server(file, layers, devices, address), address, log)
            asyncio.run(_healthy(address))
            for host, rate in rates.items():
                bed.set_rate(rate, [host])
            api = Api([address] * len(layers), self.name, model.fields["max_position_embeddings"])
            yield Running(api, bed, bed.processes().keys() - before)

    def _server(
        self,
        file: pathlib.Path,
        layers: Sequence[Address],
        devices: Sequence[int],
        address: Address,
    ) -> list[str]:
        """The command of the server."""
        options = {
            "-m": str(file),
            "-c": str(STAR_TOKENS),
            "-np": str(STAR_USERS),
            "-fit": "off",
            "--rpc": ",".join(map(str, layers)),
            "-ngl": "99",
            "--tensor-split": ",".join(map(str, _parts(devices))),
            "--host": address.host,
            "--port": str(address.port),
        }
        words = [word for pair in options.items() for word in pair]
        return [str(self.directory / "llama-server"), "-kvu", "--no-ui", *words]

    def _kill(self, bed: Testbed, before: Collection[int]) -> None:
        """Ends what was started since."""
        for pid, line in bed.processes().items():
            if pid not in before and line.startswith(str(self.directory)):
                os.kill(pid, signal.SIGKILL)


def _parts(devices: Sequence[int]) -> list[int]:
    """Layers of each host, and the output as a layer of the last: 2,2,5 of 8 on 1, 1, 2 devices."""
    parts = [2 * count for count in devices]
    return [*parts[:-1], parts[-1] + 1]


def _start(command: Sequence[str], listens: Address, log: BinaryIO) -> None:
    """Returns when the command's program listens there.

    Raises:
        ClusterError: it ends, or it takes too long.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + READY_S
    while not _listens(listens):
        if time.monotonic() > deadline or process.poll() is not None:
            log.seek(0)
            said = log.read()[-3000:].decode(errors="replace")
            raise ClusterError(f"{' '.join(command)}: does not listen:\n{said}")
        time.sleep(ASK_S)


def _listens(address: Address) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address.host, address.port)) == 0


async def _healthy(address: Address) -> None:
    """Returns when the star has read its model.

    Raises:
        ClusterError: it takes too long.
    """
    try:
        async with asyncio.timeout(READY_S):
            while True:
                async with request(address, "GET", "/health") as response:
                    if response.status == 200:
                        return
                await asyncio.sleep(ASK_S)
    except (HttpError, TimeoutError) as error:
        raise ClusterError(f"star has not read its model: {error}") from None
