"""Lose processes and servers of a service under load: `benchmarks/chaos.py --help`.

Every server has the same number of requests in flight all the time, greedy and seeded, half of them
streamed. Each answer is compared with the one before the first fault. One fault after another is
made; the table says for each what its users noticed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

# A script's import path has only its own folder; add the repository root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import psutil

from dance_jax.bench.arguments import add_seed, count, positive
from dance_jax.bench.cluster import RunError, StartedCluster, started
from dance_jax.bench.http import Address, HttpError, request
from dance_jax.bench.tables import grid
from dance_jax.bench.terminal import exit_code, terminal
from dance_jax.bench.texts import passage
from dance_jax.config import UserError
from dance_jax.files import whole_file
from dance_jax.launch.planning.hosts import read_hosts
from dance_jax.memory import format_bytes

import numpy as np  # isort: skip

#: Any two of them can hold the demo model.
HOSTS = """\
alpha address=localhost devices=1 memory=9MiB   bandwidth=500Mbps
beta  address=localhost devices=1 memory=9MiB   bandwidth=500Mbps
gamma address=localhost devices=2 memory=4.5MiB bandwidth=500Mbps
"""
#: Different requests; output tokens of each.
CASES, TOKENS = 12, 120
#: Seconds of a pause of a process; seconds for everything to be whole after a fault.
PAUSE_S, WHOLE_S = 5.0, 120.0
#: Seconds between two looks whether a server runs; seconds before a refused request is sent again.
LOOK_S, RETRY_S = 0.2, 0.3


@dataclasses.dataclass(frozen=True)
class Case:
    """A request, which has one right answer."""

    prompt: str
    #: None: greedy.
    seed: int | None
    stream: bool

    def body(self) -> bytes:
        fields = {"prompt": self.prompt, "max_tokens": TOKENS, "stream": self.stream}
        sampled = {"temperature": 0.0} if self.seed is None else {"seed": self.seed}
        return json.dumps(fields | sampled | {"ignore_eos": True}).encode()


@dataclasses.dataclass
class Record:
    """What became of a request; times are of time.monotonic()."""

    rank: int
    begin: float
    end: float = 0.0
    #: "same", "changed", "lost" or "refused" (503).
    outcome: str = "lost"
    why: str = ""
    #: Longest time between two pieces of a stream, and its end.
    gap: float = 0.0
    gap_end: float = 0.0


@dataclasses.dataclass
class Report:
    """What a fault cost."""

    fault: str
    #: Servers whose engine, and whose front end, the fault hits.
    engines: list[str]
    fronts: list[str]
    whole_s: float = 0.0
    requests: int = 0
    lost: int = 0
    changed: int = 0
    refused: int = 0
    #: Longest gap of a stream on other servers, and on the servers that lose their engines.
    gap_s: float = 0.0
    own_gap_s: float = 0.0
    reasons: list[str] = dataclasses.field(default_factory=list)


class Load:
    """The same number of requests in flight on every server.

    Args:
        addresses: of the servers.
        cases: the requests, in turn.
        each: requests in flight on each server.
    """

    def __init__(self, addresses: Sequence[Address], cases: Sequence[Case], each: int) -> None:
        self._addresses, self._cases, self._each = addresses, cases, each
        self._right: dict[Case, str] = {}
        self.records: list[Record] = []
        #: Servers whose front ends are hit by the present fault: their users lose connections.
        self.dead: set[int] = set()

    async def learn(self) -> None:
        """Get the right answers, which are the same on all servers."""
        for case in self._cases:
            ranks = range(len(self._addresses))
            answers = {await self._answer(rank, case, Record(rank, 0)) for rank in ranks}
            if len(answers) != 1:
                raise RunError(f"servers answer {case.prompt[:40]!r} differently")
            (self._right[case],) = answers

    @contextlib.asynccontextmanager
    async def running(self):
        """Keep requests in flight within the block."""
        ranks = range(len(self._addresses))
        tasks = [
            asyncio.create_task(self._user(rank, number))
            for rank in ranks
            for number in range(self._each)
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _user(self, rank: int, number: int) -> None:
        while True:
            case = self._cases[number % len(self._cases)]
            number += self._each
            record = Record(rank, time.monotonic())
            was_dead = rank in self.dead
            try:
                text = await self._answer(rank, case, record)
                record.outcome = "same" if text == self._right[case] else "changed"
            except _Refused as error:
                record.outcome, record.why = "refused", str(error)
            except (HttpError, KeyError, ValueError) as error:
                record.why = f"{type(error).__name__}: {error}"
            record.end = time.monotonic()
            if record.outcome == "lost" and (was_dead or rank in self.dead):
                record.outcome = "cut"  # its own front end died
            self.records.append(record)
            if record.outcome not in ("same", "changed"):
                await asyncio.sleep(RETRY_S)

    async def _answer(self, rank: int, case: Case, record: Record) -> str:
        address, text = self._addresses[rank], ""
        async with request(
            address, "POST", "/v1/completions", case.body(), {"Content-Type": "application/json"}
        ) as response:
            if response.status != 200:
                why = (await response.read()).decode(errors="replace")
                raise _Refused(why) if response.status == 503 else HttpError(why)
            if not case.stream:
                return json.loads(await response.read())["choices"][0]["text"]
            last = time.monotonic()
            async for event in response.events():
                now = time.monotonic()
                if now - last > record.gap:
                    record.gap, record.gap_end = now - last, now
                last = now
                if event == b"[DONE]":
                    return text
                content = json.loads(event)
                if "error" in content:
                    raise HttpError(content["error"]["message"])
                text += content["choices"][0]["text"]
        raise HttpError("the stream ended early")


class _Refused(Exception):
    """The server answered 503."""


class Bed:
    """The service's processes.

    Args:
        cluster: the running service.
        names: of the servers.
    """

    def __init__(self, cluster: StartedCluster, names: Sequence[str]) -> None:
        self.launcher = psutil.Process(cluster.pid)
        self.addresses, self.names = cluster.addresses, names
        self._cluster = cluster

    def front(self, rank: int) -> psutil.Process:
        """A server's front end: the process that listens at its port."""
        port = self.addresses[rank].port
        for process in self.launcher.children():
            with contextlib.suppress(psutil.Error):
                if any(
                    c.laddr.port == port for c in process.net_connections() if c.status == "LISTEN"
                ):
                    return process
        raise RunError(f"{self.names[rank]}: no process listens at port {port}")

    def engine(self, rank: int) -> psutil.Process:
        """A server's engine."""
        for process in self.front(rank).children():
            if "dance_jax.launch.worker.main" in process.cmdline():
                return process
        raise RunError(f"{self.names[rank]}: its front end has no engine")

    async def whole(self) -> bool:
        """Whether every server runs and knows that all others do."""
        for address in self.addresses:
            for path in ("/ready", "/health"):
                try:
                    async with asyncio.timeout(5), request(address, "GET", path) as response:
                        content = await response.read()
                        if response.status != 200 or (
                            path == "/health" and json.loads(content)["lost"]
                        ):
                            return False
                except (HttpError, TimeoutError):
                    return False
        return True

    async def rebalance(self, rank: int) -> None:
        """Have experts move now."""
        with contextlib.suppress(HttpError):
            async with request(
                self.addresses[rank],
                "POST",
                "/placement/rebalance",
                b'{"force": true}',
                {"Content-Type": "application/json"},
            ) as response:
                await response.read()

    def memory(self) -> int:
        """Bytes of memory of the launcher and its front ends."""
        processes = [self.launcher, *(self.front(rank) for rank in range(len(self.names)))]
        return sum(process.memory_info().rss for process in processes)

    def processes(self) -> list[psutil.Process]:
        return [self.launcher, *self.launcher.children(recursive=True)]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, made at one server or at two."""

    name: str
    make: Callable[[Bed, Sequence[int]], Awaitable[None]]
    #: How many of the servers lose their engine, and how many of these their front end as well.
    engines: int = 1
    fronts: int = 0


async def kill_engine(bed: Bed, ranks: Sequence[int]) -> None:
    bed.engine(ranks[0]).kill()


async def stop_engine(bed: Bed, ranks: Sequence[int]) -> None:
    engine = bed.engine(ranks[0])
    engine.suspend()
    while engine.is_running():  # until the watchdog kills it
        await asyncio.sleep(LOOK_S)


async def pause_engine(bed: Bed, ranks: Sequence[int]) -> None:
    await _pause(bed.engine(ranks[0]))


async def pause_front(bed: Bed, ranks: Sequence[int]) -> None:
    await _pause(bed.front(ranks[0]))


async def pause_launcher(bed: Bed, ranks: Sequence[int]) -> None:
    await _pause(bed.launcher)


async def kill_front(bed: Bed, ranks: Sequence[int]) -> None:
    bed.front(ranks[0]).kill()


async def lose_server(bed: Bed, ranks: Sequence[int]) -> None:
    front = bed.front(ranks[0])
    for process in [*front.children(recursive=True), front]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


async def two_engines(bed: Bed, ranks: Sequence[int]) -> None:
    engines = [bed.engine(rank) for rank in ranks[:2]]
    for engine in engines:
        engine.kill()


async def server_and_engine(bed: Bed, ranks: Sequence[int]) -> None:
    engine = bed.engine(ranks[1])
    await lose_server(bed, ranks)
    engine.kill()


async def migration_and_engine(bed: Bed, ranks: Sequence[int]) -> None:
    moving = asyncio.create_task(bed.rebalance(ranks[1]))
    await asyncio.sleep(0.5)
    bed.engine(ranks[0]).kill()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(moving, 30)


async def _pause(process: psutil.Process) -> None:
    process.suspend()
    try:
        await asyncio.sleep(PAUSE_S)
    finally:
        process.resume()


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("engine killed", kill_engine),
        Fault("engine hung", stop_engine),
        Fault("engine paused", pause_engine),
        Fault("front end killed", kill_front, fronts=1),
        Fault("front end paused", pause_front),
        Fault("launcher paused", pause_launcher, engines=0),
        Fault("server lost", lose_server, fronts=1),
        Fault("two engines killed", two_engines, engines=2),
        Fault("server lost, engine killed", server_and_engine, engines=2, fronts=1),
        Fault("engine killed in migration", migration_and_engine),
    )
}


async def run(bed: Bed, options: argparse.Namespace, say: Callable[[Report], None]) -> list[Report]:
    """Make faults under load, one after another."""
    chance = random.Random(options.seed)
    texts = np.random.default_rng(options.seed)
    cases = [Case(passage(texts), None if n % 2 else n, stream=n % 4 < 2) for n in range(CASES)]
    load = Load(bed.addresses, cases, options.in_flight)
    await load.learn()
    reports: list[Report] = []
    async with load.running():
        began = time.monotonic()
        await asyncio.sleep(2)
        while time.monotonic() - began < options.seconds:
            for fault in _schedule(chance, options.faults):
                if time.monotonic() - began > options.seconds and reports:
                    break
                report = await _one(bed, load, fault, chance)
                reports.append(report)
                say(report)
    return reports


def _schedule(chance: random.Random, names: Sequence[str]) -> list[Fault]:
    """All faults in random order."""
    chosen = [FAULTS[name] for name in names]
    chance.shuffle(chosen)
    return chosen


async def _one(bed: Bed, load: Load, fault: Fault, chance: random.Random) -> Report:
    ranks = list(range(len(bed.names)))
    chance.shuffle(ranks)
    report = Report(
        fault.name,
        [bed.names[rank] for rank in ranks[: fault.engines]],
        [bed.names[rank] for rank in ranks[: fault.fronts]],
    )
    load.records.clear()
    load.dead = set(ranks[: fault.fronts])
    began = time.monotonic()
    await fault.make(bed, ranks)
    await asyncio.sleep(1.0)
    while not await bed.whole():
        if time.monotonic() - began > WHOLE_S:
            raise RunError(f"{fault.name}: not whole after {WHOLE_S:g} s")
        await asyncio.sleep(LOOK_S)
    report.whole_s = time.monotonic() - began
    # Let what was in flight end: a stream's gap is known then.
    await asyncio.sleep(4.0)
    load.dead = set()
    for record in load.records:
        report.requests += 1
        report.lost += record.outcome == "lost"
        report.changed += record.outcome == "changed"
        report.refused += record.outcome == "refused"
        if record.outcome == "lost":
            report.reasons.append(f"{bed.names[record.rank]}: {record.why}")
        if record.outcome == "same" and record.gap_end > began:
            if record.rank in ranks[: fault.engines]:
                report.own_gap_s = max(report.own_gap_s, record.gap)
            else:
                report.gap_s = max(report.gap_s, record.gap)
    return report


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/chaos.py",
        description="Loses processes and servers of a service under load, and measures what its "
        "users notice. All servers are on this machine.",
    )
    parser.add_argument("--hosts", type=pathlib.Path, help="hosts file (default: three servers)")
    parser.add_argument("--seconds", type=positive, default=120.0, help="(default: %(default)g)")
    parser.add_argument(
        "--in-flight", type=count, default=10, help="requests on each server (default: %(default)s)"
    )
    parser.add_argument(
        "--faults",
        type=lambda text: text.split(","),
        default=list(FAULTS),
        help=f"comma-separated names (default: all: {', '.join(FAULTS)})",
    )
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the results")
    parser.add_argument(
        "launch", nargs="*", metavar="-- OPTION", help="further options of dance_jax.launch"
    )
    add_seed(parser, "of the schedule of faults (default: %(default)s)")
    return parser


def main() -> int:
    """Run the benchmark; returns 1 if a living front end lost or changed a request."""
    options = parser().parse_args()
    for name in options.faults:
        if name not in FAULTS:
            raise UserError(f"--faults: {name!r} is unknown; the faults are {', '.join(FAULTS)}")
    console = terminal(120)
    with _hosts(options.hosts) as hosts:
        spec = read_hosts(hosts)
        with started(spec, ["--hosts", str(hosts), *options.launch]) as cluster:
            asyncio.run(cluster.ready())
            bed = Bed(cluster, spec.names)
            before = bed.memory()

            def say(report: Report) -> None:
                console.print(
                    f"{report.fault}: whole after {report.whole_s:.1f} s, longest gap "
                    f"{report.gap_s:.2f} s, own {report.own_gap_s:.2f} s, lost {report.lost}, "
                    f"changed {report.changed}"
                )
                for why in report.reasons[:5]:
                    console.print(f"  lost: {why}", markup=False)

            reports = asyncio.run(run(bed, options, say))
            after, processes = bed.memory(), bed.processes()
        _, left = psutil.wait_procs(processes, timeout=10)
    table = grid("fault", "lost", "changed", "refused", "gap, s", "own gap, s", "whole, s")
    for report in reports:
        table.add_row(
            report.fault,
            *map(str, (report.lost, report.changed, report.refused)),
            *(f"{value:.2f}" for value in (report.gap_s, report.own_gap_s)),
            f"{report.whole_s:.1f}",
        )
    console.print(table)
    console.print(
        f"processes left: {len(left)}; memory of launcher and front ends: "
        f"{format_bytes(before)} before, {format_bytes(after)} after"
    )
    if options.output is not None:
        found = {
            "faults": [dataclasses.asdict(report) for report in reports],
            "processes_left": len(left),
            "memory_before": before,
            "memory_after": after,
        }
        with whole_file(options.output) as file:
            file.write(json.dumps(found, indent=1).encode())
    return int(bool(left or any(report.lost or report.changed for report in reports)))


@contextlib.contextmanager
def _hosts(path: pathlib.Path | None) -> Iterator[pathlib.Path]:
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        made = pathlib.Path(folder) / "hosts.txt"
        made.write_text(HOSTS)
        yield made


if __name__ == "__main__":
    sys.exit(exit_code(main, RunError, HttpError))
