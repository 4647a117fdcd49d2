"""Sections over loopback: `processor`, `stopped` and `killed`."""

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
from benchmarks.targets import Target
from dance_jax.bench.client import Api, Call
from dance_jax.bench.cluster import RunError, StartedCluster

from .streams import longest_gap, same, streaming, whole

#: Token ids of a prompt; every model has them.
PROMPT = list(range(40, 56))
#: Tokens of the stream whose processor time is measured, and of the streams beside a failure.
MEASURED, STREAM = 600, 1500
#: Targets: processor time of the other servers over that of the serving one; longest gap in the
#: other servers' streams, in seconds.
OTHERS, GAP_S = 0.35, 0.6
#: Seconds for which a server is stopped.
STOPPED_S = 8.0
#: Slots of each server. The first holds about half of the demo's experts, the others hold all, so
#: that the second may fail.
REPLICAS = (150, 330, 330)
#: Index of the server that serves the measured stream, and of the server that fails.
SERVING, FAILING = 0, 1
#: Seconds before and after a failure; seconds within which the failed server must answer again, and
#: between two checks.
AROUND_S, BACK_S, ASK_S = 1.0, 120.0, 0.2


@dataclasses.dataclass(frozen=True)
class Processor:
    """Results of `processor`, for each stream.

    Attributes:
        serving_s: processor seconds of the serving server.
        others_s: processor seconds of all other servers.
        tokens_per_s: speed of the stream.
    """

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
            f"processor: other servers over the serving server {self.ratio:.2f}; "
            f"{statistics.median(per_token):.2f} ms per token on all servers; "
            f"{statistics.median(self.tokens_per_s):.0f} tokens/s"
        )

    def targets(self) -> Iterator[Target]:
        yield Target("processor: servers without users over the serving one", OTHERS, self.ratio)


@dataclasses.dataclass(frozen=True)
class Failure:
    """Results of `stopped` or `killed`.

    Attributes:
        section: "stopped" or "killed".
        gaps_s: for each failure, the longest gap in the other servers' streams, in seconds.
        lasted_s: for each failure, seconds until all servers answered again.
        same: number of answers with the text of the quiet run.
        answers: number of all answers.
    """

    section: str
    gaps_s: list[float]
    lasted_s: list[float]
    same: int
    answers: int

    def line(self) -> str:
        return (
            f"{self.section}: longest gap in the other servers' streams {max(self.gaps_s):.2f} s; "
            f"{self.same} of {self.answers} answers unchanged; all servers answer after "
            f"{max(self.lasted_s):.1f} s"
        )

    def targets(self) -> Iterator[Target]:
        if self.section == "stopped":
            name = "stopped: seconds of the longest gap in the other servers' streams"
            yield Target(name, GAP_S, max(self.gaps_s))
        changed = float(self.answers - self.same)
        yield Target(f"{self.section}: changed answers", 0.0, changed)


def processor(repeats: int, root: pathlib.Path, arguments: Sequence[str]) -> Processor:
    """Measure processor time during streams on the first of three servers."""
    words = ["--policy", "dance", "--activations", str(EXAMPLES / "activations.npz"), *arguments]

    async def measure(cluster: StartedCluster) -> Processor:
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
    """Stop a server whose experts all have replicas on other servers, for STOPPED_S."""

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
    """Kill an engine of the same servers, which is then restarted."""

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
    """Measure the other servers' streams while `fail` acts on the failing server's processes."""
    hosts = folder / "hosts.txt"
    names = ("alpha", "beta", "gamma")
    hosts.write_text(
        "".join(
            f"{name} address=localhost experts={slots}\n"
            for name, slots in zip(names, REPLICAS, strict=True)
        )
    )

    async def measure(cluster: StartedCluster) -> Failure:
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
) -> contextlib.AbstractContextManager[StartedCluster]:
    return Place(hosts, root=root).serving(["--rebalance-interval", "0", *words])


@contextlib.asynccontextmanager
async def _ready(cluster: StartedCluster) -> AsyncIterator[Api]:
    await cluster.ready()
    yield await Api.connect(cluster.addresses)
    cluster.check()


async def _answers(api: Api) -> None:
    """Wait until the failed server answers again.

    Raises:
        RunError: the server does not answer within BACK_S.
    """
    try:
        async with asyncio.timeout(BACK_S):
            await whole(api, Call(FAILING, PROMPT, 2))
    except TimeoutError:
        raise RunError(
            f"the failed server does not answer {BACK_S:g} s after the failure"
        ) from None


def _trees(cluster: StartedCluster) -> list[list[psutil.Process]]:
    """Return each server's processes: its front end, which listens, and all its descendants."""
    trees = {}
    for front in psutil.Process(cluster.pid).children():
        for connection in front.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                trees[connection.laddr.port] = [front, *front.children(recursive=True)]
    return [trees[address.port] for address in cluster.addresses]


def _seconds(tree: Sequence[psutil.Process]) -> float:
    """Return the processor seconds of all processes so far."""
    return sum(sum(process.cpu_times()[:2]) for process in tree)
