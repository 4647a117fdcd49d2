"""Start the systems on the hosts of a testbed."""

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
from dance_jax.bench.client import Api
from dance_jax.bench.cluster import LOOPBACK, RunError, first_free_port
from dance_jax.bench.http import Address, HttpError, request

#: Weight formats that both this project and llama.cpp have.
FORMATS = ("float32", "int8")
#: Expert slots of each device: on four devices, 1.32 times the experts of the 200 M model.
SLOTS = 148
#: Users that the star serves at once, and tokens of their shared KV cache.
STAR_USERS, STAR_TOKENS = 12, 4096
RPC_PORT = 50052
#: Seconds within which the star must be ready, and between two checks.
READY_S, ASK_S = 300.0, 0.1


def about(model: Model, form: str) -> list[str]:
    """Return the options of dance_jax.launch for a model in a format of FORMATS."""
    words = ["--model", str(model.named()), "--cache-dir", str(model.work / "cache")]
    return words if form == "float32" else [*words, "--experts", form, "--trunk", form]


class Running:
    """A running system that is ready for requests.

    Args:
        api: client of the system's servers, one per host.
        bed: the testbed that the system runs on.
        pids: the system's processes on the hosts and the head.
    """

    def __init__(self, api: Api, bed: Testbed, pids: Iterable[int]) -> None:
        self.api = api
        self._bed, self._pids = bed, tuple(pids)

    def processor_s(self) -> float:
        """Return the processor time of all the system's processes so far, in seconds.

        Raises:
            RunError: a process has ended.
        """
        try:
            return sum(map(processor_seconds, self._pids))
        except FileNotFoundError:
            raise RunError("a process of a system ended during the measurement") from None

    def interface_bytes(self) -> int:
        """Return the bytes sent and received by the hosts' interfaces so far, of all systems."""
        return sum(map(sum, self._bed.counters().values()))


class System(Protocol):
    """A system that can be started."""

    @property
    def name(self) -> str: ...

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of FORMATS that the system supports."""
        ...

    def serving(
        self, bed: Testbed, model: Model, form: str
    ) -> contextlib.AbstractContextManager[Running]:
        """Run the system for the block, with a model in one of its formats."""
        ...


@dataclasses.dataclass(frozen=True)
class Dance:
    """This project, or another checkout of it.

    Attributes:
        name: of the system.
        policy: the placement policy.
        activations: file of activations that experts are placed by.
        root: of the checkout.
        port: of all servers.
        formats: that the checkout supports; old versions serve models only in their own format.
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
    """llama.cpp's server on the head, with rpc-servers on the hosts that compute its layers.

    Attributes:
        directory: with llama.cpp's programs.
    """

    directory: pathlib.Path
    name: str = "star"
    formats: tuple[str, ...] = FORMATS

    @contextlib.contextmanager
    def serving(self, bed: Testbed, model: Model, form: str) -> Iterator[Running]:
        address = Address(LOOPBACK, first_free_port(1))
        layers = [Address(host.address, RPC_PORT) for host in bed.hosts.values()]
        before = bed.processes().keys()
        with contextlib.ExitStack() as stack:
            log = stack.enter_context((bed.state / "star.log").open("w+b"))
            # Without this, the rpc-servers would outlive their ssh sessions.
            stack.callback(self._kill, bed, before)
            rates = dict(bed.rates)
            # The server sends the weights to the rpc-servers, which is not measured.
            bed.set_rate(None)
            for host, listens in zip(bed.hosts, layers, strict=True):
                rpc = ["exec", str(self.directory / "ggml-rpc-server"), "-H", listens.host]
                rpc += ["-p", str(listens.port), "-t", "1"]
                login = ["ssh", "-F", str(bed.ssh_config), host, shlex.join(rpc)]
                _start(login, listens, log)
            # The server runs on the head, as this process does.
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
        """Return the command line of llama-server."""
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
        """Kill llama.cpp's processes that were started since `before`."""
        for pid, line in bed.processes().items():
            if pid not in before and line.startswith(str(self.directory)):
                os.kill(pid, signal.SIGKILL)


def _parts(devices: Sequence[int]) -> list[int]:
    """Return the layers of each host; the output counts as a layer of the last host.

    With 8 layers on hosts with 1, 1 and 2 devices: 2, 2, 5.
    """
    parts = [2 * count for count in devices]
    return [*parts[:-1], parts[-1] + 1]


def _start(command: Sequence[str], listens: Address, log: BinaryIO) -> None:
    """Start a program and wait until it listens.

    Raises:
        RunError: the program ended, or does not listen within READY_S.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + READY_S
    while not _listens(listens):
        if time.monotonic() > deadline or process.poll() is not None:
            log.seek(0)
            tail = log.read()[-3000:].decode(errors="replace")
            raise RunError(f"`{' '.join(command)}` does not listen on {listens}:\n{tail}")
        time.sleep(ASK_S)


def _listens(address: Address) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address.host, address.port)) == 0


async def _healthy(address: Address) -> None:
    """Wait until the star has loaded its model.

    Raises:
        RunError: the star ended, or has not loaded the model within READY_S.
    """
    try:
        async with asyncio.timeout(READY_S):
            while True:
                async with request(address, "GET", "/health") as response:
                    if response.status == 200:
                        return
                await asyncio.sleep(ASK_S)
    except (HttpError, TimeoutError) as error:
        raise RunError(f"the star did not load its model (limit {READY_S:g} s): {error}") from None
