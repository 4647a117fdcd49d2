"""Sections over loopback: servers without users, a server that is stopped, an engine that dies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import signal
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

import psutil

from benchmarks.command import EXAMPLES
from benchmarks.live.places import Place
from benchmarks.serving.client import Api, Call
from benchmarks.serving.cluster import Cluster, ClusterError
from benchmarks.targets import Target

from .streams import longest_gap, same, streaming, whole

#: Token ids of a prompt that any model has.
PROMPT = list(range(40, 56))
#: Tokens of the stream whose processor time is measured, and of those beside a failure.
MEASURED, STREAM = 600, 1500
#: The others over the serving server; longest gap of the others' streams, in seconds.
OTHERS, GAP_S = 0.35, 0.6
#: Seconds that a server stands still.
STOPPED_S = 8.0
#: The first server has about half of the demo's experts, the others all: the second can be missed.
REPLICAS = (150, 330, 330)
#: Servers: who serves the measured stream; who fails.
SERVING, FAILING = 0, 1
#: Seconds before and after a failure; until a dead engine must be back, and between two looks.
AROUND_S, BACK_S, ASK_S = 1.0, 120.0, 0.2


@dataclasses.dataclass(frozen=True)
class Processor:
    """Of each stream: seconds of processor time of the serving server and of all others."""

    serving_s: list[float]
    others_s: list[float]
    tokens_per_s: list[float]

    @property
    def ratio(self) -> float:
        pairs = zip(self.others_s, self.serving_s, strict=True)
        return statistics.median(others / serving for others, serving in pairs)

    def line(self) -> str:
        per_token = [
            1e3 * (a + b) / MEASURED for a, b in zip(self.serving_s, self.others_s, strict=True)
        ]
        return (
            f"processor: others over the serving server {self.ratio:.2f}; "
            f"{statistics.median(per_token):.2f} ms a token over all; "
            f"{statistics.median(self.tokens_per_s):.0f} tokens/s"
        )

    def targets(self) -> Iterator[Target]:
        yield Target("processor: servers without users over the serving one", OTHERS, self.ratio)


@dataclasses.dataclass(frozen=True)
class Failure:
    """Of each failure: the longest gap of the others' streams, in seconds.

    Attributes:
        section: "stopped" or "killed".
        same, answers: with the text of a quiet run, and all.
        lasted_s: until all servers answered again.
    """

    section: str
    gaps_s: list[float]
    lasted_s: list[float]
    same: int
    answers: int

    def line(self) -> str:
        return (
            f"{self.section}: longest gap of the others {max(self.gaps_s):.2f} s, "
            f"{self.same} of {self.answers} answers the same; all answer after "
            f"{max(self.lasted_s):.1f} s"
        )

    def targets(self) -> Iterator[Target]:
        if self.section == "stopped":
            yield Target("stopped: longest gap of the others, seconds", GAP_S, max(self.gaps_s))
        changed = float(self.answers - self.same)
        yield Target(f"{self.section}: answers that have changed", 0.0, changed)


def processor(repeats: int, root: pathlib.Path, arguments: Sequence[str]) -> Processor:
    """Streams on the first server of three."""
    words = ["--policy", "dance", "--activations", str(EXAMPLES / "activations.npz"), *arguments]

    async def measure(cluster: Cluster) -> Processor:
        found = Processor([], [], [])
        async with _ready(cluster) as api:
            trees = _trees(cluster)
            await whole(api, Call(SERVING, PROMPT, 50))
            for _ in range(repeats):
                before = [_seconds(tree) for tree in trees]
                answer = await whole(api, Call(SERVING, PROMPT, MEASURED))
                spent = [_seconds(tree) - was for tree, was in zip(trees, before, strict=True)]
                found.serving_s.append(spent.pop(SERVING))
                found.others_s.append(sum(spent))
                found.tokens_per_s.append(MEASURED / answer.end_s)
        return found

    with _serving(EXAMPLES / "hosts.txt", root, words) as cluster:
        return asyncio.run(measure(cluster))


def stopped(
    repeats: int, root: pathlib.Path, arguments: Sequence[str], folder: pathlib.Path
) -> Failure:
    """A server whose experts others hold as well stands still."""

    async def stop(tree: list[psutil.Process]) -> None:
        try:
            for process in tree:
                process.suspend()
            await asyncio.sleep(STOPPED_S)
        finally:
            for process in tree:
                process.resume()

    return _failure("stopped", repeats, root, arguments, folder, stop)


def killed(
    repeats: int, root: pathlib.Path, arguments: Sequence[str], folder: pathlib.Path
) -> Failure:
    """An engine of the same servers dies and is started anew."""

    async def kill(tree: list[psutil.Process]) -> None:
        (engine,) = (p for p in tree if "dance_jax.launch.worker.main" in p.cmdline())
        os.kill(engine.pid, signal.SIGKILL)

    return _failure("killed", repeats, root, arguments, folder, kill)


def _failure(
    section: str,
    repeats: int,
    root: pathlib.Path,
    arguments: Sequence[str],
    folder: pathlib.Path,
    fail: Callable[[list[psutil.Process]], Awaitable[None]],
) -> Failure:
    """Streams of the others while `fail` does something to a server's processes."""
    hosts = folder / "hosts.txt"
    names = ("alpha", "beta", "gamma")
    hosts.write_text(
        "".join(
            f"{name} address=localhost experts={slots}\n"
            for name, slots in zip(names, REPLICAS, strict=True)
        )
    )

    async def measure(cluster: Cluster) -> Failure:
        found = Failure(section, [], [], 0, 0)
        async with _ready(cluster) as api:
            calls = [
                Call(server, PROMPT, STREAM) for server in range(len(names)) if server != FAILING
            ]
            quiet = {call.server: (await whole(api, call)).text for call in calls}
            for _ in range(repeats):
                tree = _trees(cluster)[FAILING]
                async with streaming(api, calls) as answers:
                    await asyncio.sleep(AROUND_S)
                    began = asyncio.get_running_loop().time()
                    await fail(tree)
                    await _answers(api)
                    lasted_s = asyncio.get_running_loop().time() - began
                    await asyncio.sleep(AROUND_S)
                equal, count = same(answers, quiet)
                found = dataclasses.replace(
                    found,
                    gaps_s=[*found.gaps_s, longest_gap(answers)],
                    lasted_s=[*found.lasted_s, lasted_s],
                    same=found.same + equal,
                    answers=found.answers + count,
                )
        return found

    with _serving(hosts, root, arguments) as cluster:
        return asyncio.run(measure(cluster))


def _serving(
    hosts: pathlib.Path, root: pathlib.Path, words: Sequence[str]
) -> contextlib.AbstractContextManager[Cluster]:
    return Place(hosts, root=root).serving(["--rebalance-interval", "0", *words])


@contextlib.asynccontextmanager
async def _ready(cluster: Cluster) -> AsyncIterator[Api]:
    await cluster.ready()
    yield await Api.connect(cluster.addresses)
    cluster.check()


async def _answers(api: Api) -> None:
    """Returns when the server that failed answers again.

    Raises:
        ClusterError: it does not.
    """
    try:
        async with asyncio.timeout(BACK_S):
            await whole(api, Call(FAILING, PROMPT, 2))
    except TimeoutError:
        raise ClusterError(f"no answer {BACK_S:g} s after a failure") from None


def _trees(cluster: Cluster) -> list[list[psutil.Process]]:
    """Processes of each server: its front end, which listens, and what that has started."""
    trees = {}
    for front in psutil.Process(cluster.pid).children():
        for connection in front.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                trees[connection.laddr.port] = [front, *front.children(recursive=True)]
    return [trees[address.port] for address in cluster.addresses]


def _seconds(tree: Sequence[psutil.Process]) -> float:
    """Of processor time."""
    return sum(sum(process.cpu_times()[:2]) for process in tree)
