"""Sections on a testbed: `beside`, `many` and `bytes`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from benchmarks.command import EXAMPLES, say
from benchmarks.live.places import Place
from benchmarks.live.tasks import Askers, read_prompts, read_task
from benchmarks.live.watch import sample
from benchmarks.namespaces import Testbed
from benchmarks.serving.task_files import read_texts, task_files
from benchmarks.targets import Target
from dance_jax.bench.client import Answer, Api, Call
from dance_jax.bench.cluster import RunError
from dance_jax.bench.drive import open_loop
from dance_jax.bench.figures import failures, gaps_s
from dance_jax.bench.texts import Texts
from dance_jax.launch.planning.costs import exchanged_bytes
from dance_jax.launch.planning.defaults import engine_config
from dance_jax.models.convert import outline
from dance_jax.models.directory import demo_dir
from dance_jax.models.tokenizer import Tokenizer

from .streams import whole

#: Tokens of a stream's prompt, of its answer, and of the prompts beside the stream.
SHORT, STREAM, LONG = 32, 200, 1500
#: Targets: p99 gap beside prompts over that on idle hosts; mean latency of many hosts over that of
#: few; bytes of prompts, and of the example prompts with answers, over the lower bound.
BESIDE, MANY, PREFILL_BYTES, RUN_BYTES = 1.3, 1.5, 1.1, 1.3
#: Hosts of the two clusters; slots of each host for the demo's 320 experts, spare slots included.
ALL, FEW, SLOTS = 12, 3, 120
#: Seconds until all servers' metrics include their last steps.
REPORT_S = 1.5
#: Requests per host, and maximum tokens of each answer.
REQUESTS, ANSWER = 12, 32
#: Lengths of the prompts whose bytes are measured, and number of prompts of each length per host.
PREFILLS, OF_EACH = (64, 128, 256, 512), 2

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class Beside:
    """Results of `beside`: p99 gap in seconds of each repetition, by server."""

    quiet_s: dict[str, list[float]]
    beside_s: dict[str, list[float]]

    @property
    def ratios(self) -> dict[str, float]:
        return {
            name: statistics.median(
                late / early for early, late in zip(quiet, self.beside_s[name], strict=True)
            )
            for name, quiet in self.quiet_s.items()
        }

    def line(self) -> str:
        shown = ", ".join(
            f"{name} {ratio:.2f} (idle {1e3 * statistics.median(self.quiet_s[name]):.1f} ms)"
            for name, ratio in self.ratios.items()
        )
        return f"beside: p99 gap beside another host's prompts, over that on idle hosts: {shown}"

    def targets(self) -> Iterator[Target]:
        found = [(ratio, name) for name, ratio in self.ratios.items()]
        yield Target.of_worst("beside: p99 gap beside prompts, over idle hosts", BESIDE, found)


@dataclasses.dataclass(frozen=True)
class Many:
    """Results of `many`: mean latency in seconds of each repetition, on few and on all hosts."""

    few_s: list[float]
    all_s: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.all_s, self.few_s, strict=True))

    def line(self) -> str:
        few, many = statistics.median(self.few_s), statistics.median(self.all_s)
        return f"many: mean latency of {ALL} hosts {many:.2f} s, of {FEW} {few:.2f} s"

    def targets(self) -> Iterator[Target]:
        yield Target(f"many: mean latency of {ALL} hosts over {FEW}", MANY, self.ratio)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Results of `bytes`: (bytes that all interfaces sent, lower bound)."""

    prefill: tuple[float, float]
    run: tuple[float, float]

    def line(self) -> str:
        pairs = (self.prefill, self.run)
        shown = [f"{sent / 1e6:.2f} MB, bound {bound / 1e6:.2f}" for sent, bound in pairs]
        return f"bytes sent: prompts {shown[0]}; example prompts with answers {shown[1]}"

    def targets(self) -> Iterator[Target]:
        (prefill, prefill_bound), (run, run_bound) = self.prefill, self.run
        yield Target("bytes: prompts over the bound", PREFILL_BYTES, prefill / prefill_bound)
        yield Target("bytes: example prompts over the bound", RUN_BYTES, run / run_bound)


def beside(bed: Testbed, place: Place, repeats: int, words: Sequence[str]) -> Beside:
    """Measure a stream of each server, on idle hosts and beside long prompts of the next server."""
    names, texts = list(bed.hosts), _texts(len(bed.hosts))

    async def measure(api: Api) -> Beside:
        found = Beside({name: [] for name in names}, {name: [] for name in names})
        rng = np.random.default_rng(0)
        for _ in range(repeats):
            for server, name in enumerate(names):
                call = Call(server, texts.cut(server, SHORT, rng), STREAM)
                found.quiet_s[name].append(_p99(await whole(api, call)))
                async with _prompts(api, texts, (server + 1) % len(names), rng):
                    found.beside_s[name].append(_p99(await whole(api, call)))
        return found

    return _served(place, [*_examples(), *words], measure)


@contextlib.asynccontextmanager
async def _prompts(
    api: Api, texts: Texts, server: int, rng: np.random.Generator
) -> AsyncIterator[None]:
    """Send long prompts to a server during the block, one after another; none is cached."""
    over = asyncio.Event()

    async def ask() -> None:
        while not over.is_set():
            await whole(api, Call(server, texts.cut(server, LONG, rng), 1))

    async with asyncio.TaskGroup() as group:
        group.create_task(ask())
        try:
            yield
        finally:
            over.set()


def _p99(answer: Answer) -> float:
    return float(np.quantile(gaps_s([answer]), 0.99))


def many(bed: Testbed, place: Place, repeats: int, rate: float, words: Sequence[str]) -> Many:
    """Measure latency under the same Poisson rate per host, on FEW and on ALL hosts.

    Args:
        bed: a testbed with ALL hosts.
        place: where the servers run.
        repeats: number of repetitions.
        rate: requests per second per host.
        words: further arguments of the launcher.
    """
    some = Testbed(bed.name, list(bed.hosts.values())[:FEW], bed.rates, bed.cores)
    few, all_ = (
        _latencies(dataclasses.replace(place, bed=part), len(part.hosts), repeats, rate, words)
        for part in (some, bed)
    )
    return Many(few, all_)


def _latencies(
    place: Place, servers: int, repeats: int, rate: float, words: Sequence[str]
) -> list[float]:
    """Measure the mean latency of each repetition, in seconds."""
    files = sorted((EXAMPLES / "tasks").glob("*.heldout.jsonl"))[:FEW]
    tasks = [read_task(files[server % FEW]) for server in range(servers)]
    context = engine_config(outline(demo_dir()).config).max_model_len
    tokenizer = Tokenizer.load(demo_dir())

    async def measure(api: Api) -> list[float]:
        means = []
        for seed in range(repeats):
            askers = Askers(tokenizer, context, ANSWER, rate, seed)
            plan = askers.plan([tasks], REQUESTS, tokenizer.encode(f"{seed} "))
            answers = await open_loop(api, plan.calls, lambda: None)
            if failed := failures(answers):
                raise RunError(f"a request failed: {failed[0]}")
            means.append(float(np.mean([each.end_s - each.due_s for each in answers])))
            say(f"{servers} hosts, {seed + 1} of {repeats}: mean latency {means[-1]:.2f} s")
        return means

    return _served(place, words, measure)


def bytes_sent(bed: Testbed, place: Place, words: Sequence[str]) -> Bytes:
    """Measure the bytes of prompts with one token of answer, then of the example prompts."""
    model, texts = outline(demo_dir()), _texts(len(bed.hosts))
    config = engine_config(model.config, formats=model.formats)
    row = exchanged_bytes(model.config.hidden_size, config)
    tokenizer, rng = Tokenizer.load(demo_dir()), np.random.default_rng(0)
    servers = range(len(bed.hosts))
    prefills = [
        Call(server, texts.cut(server, length, rng), 1)
        for length in PREFILLS
        for _ in range(OF_EACH)
        for server in servers
    ]
    prompts = read_prompts(EXAMPLES / "prompts.jsonl")
    run = [
        Call(number % len(servers), tokenizer.encode(prompt), 128)
        for number, prompt in enumerate(prompts)
    ]

    async def measure(api: Api) -> Bytes:
        return Bytes(await sent(api, prefills), await sent(api, run))

    async def sent(api: Api, calls: Sequence[Call]) -> tuple[float, float]:
        # Read the metrics outside of the measurement, because they cross the interfaces too.
        before, begun = await sample(api, time.perf_counter()), place.sent()
        answers = await open_loop(api, calls, lambda: None)
        moved = np.subtract(place.sent(), begun).sum()
        if failed := failures(answers):
            raise RunError(f"a request failed: {failed[0]}")
        await asyncio.sleep(REPORT_S)
        after = await sample(api, time.perf_counter())
        transfers = np.subtract(after.transfers, before.transfers).sum()
        return float(moved), float(transfers * row)

    return _served(place, [*_examples(), *words], measure)


def _served(
    place: Place, words: Sequence[str], measure: Callable[[Api], Awaitable[Found]]
) -> Found:
    """Start the servers, run `measure` on them, and return its result."""

    async def run() -> Found:
        await cluster.ready()
        say(f"{len(cluster.addresses)} servers are ready")
        return await measure(await Api.connect(cluster.addresses))

    with place.serving(["--rebalance-interval", "0", *words]) as cluster:
        return asyncio.run(run())


def _examples() -> list[str]:
    return ["--activations", str(EXAMPLES / "activations.npz")]


def _texts(servers: int) -> Texts:
    return read_texts(task_files(EXAMPLES / "tasks"), servers, Tokenizer.load(demo_dir()))
