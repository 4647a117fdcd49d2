"""The sections: their servers, requests and results."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from rich.console import Console

from benchmarks.live.places import Place, count_activations
from benchmarks.live.tasks import Askers, Plan, Task, write_fit
from benchmarks.live.watch import (
    ASK_S,
    Sample,
    Watched,
    force,
    load,
    placement,
    put,
    watched,
)
from dance_jax.bench.client import Api, Call
from dance_jax.bench.cluster import RunError
from dance_jax.bench.terminal import progress
from dance_jax.engine.step_clock import WINDOW_S

SECTIONS = ("shift", "accumulate", "pause", "stable")
#: Prompts per server, and tokens per answer, that initial placements are fitted to.
FIT_PROMPTS, FIT_TOKENS = 40, 32
#: Decision intervals in a phase of `shift`, and in all of `stable`.
INTERVALS, STABLE_INTERVALS = 4, 10
#: Half-lives of the statistics in an interval, as with the launcher's defaults.
HALF_LIVES = 5
#: `pause`: seconds for which streams run before a migration (the first half is for their prefill);
#: half-life in seconds; number of migrations.
STEADY_S, PAUSE_HALF_LIFE_S, ROUNDS = 9.0, 4.0, 4

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings that all sections share.

    Attributes:
        place: where servers run.
        askers: users that send the requests.
        phases: each server's task, before and after the shift.
        requests: number per server and phase.
        streams: number per server in the section `pause`.
        interval_s: seconds between two placement decisions.
        model: arguments about the model, for every launcher.
        serving: further arguments, for launchers that serve.
        work: a directory for intermediate files.
        console: for progress.
    """

    place: Place
    askers: Askers
    phases: tuple[tuple[Task, ...], tuple[Task, ...]]
    requests: int
    streams: int
    interval_s: float
    model: tuple[str, ...]
    serving: tuple[str, ...]
    work: pathlib.Path
    console: Console

    def fitted(self, phase: int) -> pathlib.Path:
        """Return a phase's activations, counted once on prompts that no user sends."""
        result = self.work / f"fitted{phase}.npz"
        if not result.exists():
            prompts = self.work / f"fit{phase}.jsonl"
            write_fit(prompts, self.phases[phase], self.place.spec.names, FIT_PROMPTS)
            self.console.print(f"counting activations of {self.names(phase)}")
            count_activations(self.place.hosts, prompts, result, FIT_TOKENS, self.model)
        return result

    def names(self, phase: int) -> str:
        return ", ".join(task.name for task in self.phases[phase])

    def serve(
        self,
        title: str,
        phase: int,
        scheduling: Sequence[str],
        run: Callable[[Api], Awaitable[Found]],
    ) -> Found:
        """Start servers that are placed for a phase, and return the result of `run`.

        Args:
            title: printed when the servers are ready.
            phase: index of the phase.
            scheduling: the launcher's arguments about migration.
            run: the measurement.
        """

        async def asked() -> Found:
            await cluster.ready()
            self.console.print(title)
            return await run(await Api.connect(cluster.addresses))

        words = ["--activations", str(self.fitted(phase)), *scheduling, *self.model, *self.serving]
        with self.place.serving(words) as cluster:
            found = asyncio.run(asked())
            cluster.check()
            return found

    def ask(self, title: str, phase: int, scheduling: Sequence[str], plan: Plan) -> Watched:
        """Start servers as `serve` does, and send them a plan of requests."""

        async def run(api: Api) -> Watched:
            with progress(self.console, title, len(plan.calls)) as done:
                return await load(api, plan.calls, done, self.place.sent)

        return self.serve(title, phase, scheduling, run)


def still() -> list[str]:
    """Return the launcher's arguments for no migration."""
    return ["--rebalance-interval", "0"]


def moving(interval_s: float, half_life_s: float) -> list[str]:
    """Return the launcher's arguments for migration; with half_life_s 0, statistics never fade."""
    return ["--rebalance-interval", f"{interval_s:.3f}", "--half-life", f"{half_life_s:.3f}"]


@dataclasses.dataclass(frozen=True)
class Shift:
    """Results of the section `shift`.

    Attributes:
        plan: requests of the runs `stay` and `move`.
        stay: run with servers placed for the first phase, without migration.
        move: run with servers placed for the first phase, with migration.
        placed: run of the second phase only, with servers placed for it.
    """

    plan: Plan
    stay: Watched
    move: Watched
    placed: Watched


def shift(setting: Setting) -> Shift:
    """Run the section `shift`."""
    plan = setting.askers.plan(setting.phases, setting.requests)
    half_life_s = setting.interval_s / HALF_LIVES
    return Shift(
        plan,
        setting.ask("no migration", 0, still(), plan),
        setting.ask("migration", 0, moving(setting.interval_s, half_life_s), plan),
        setting.ask("placed for the second task", 1, still(), plan.after(plan.shift_s)),
    )


def accumulate(setting: Setting) -> Watched:
    """Run the section `accumulate`, with the plan of `shift`."""
    plan = setting.askers.plan(setting.phases, setting.requests)
    title = "migration, statistics that never fade"
    return setting.ask(title, 0, moving(setting.interval_s, 0.0), plan)


def stable(setting: Setting) -> Watched:
    """Run the section `stable`."""
    per_interval = setting.requests / INTERVALS
    plan = setting.askers.plan(setting.phases[:1], round(STABLE_INTERVALS * per_interval))
    half_life_s = setting.interval_s / HALF_LIVES
    return setting.ask("a stable workload", 0, moving(setting.interval_s, half_life_s), plan)


@dataclasses.dataclass(frozen=True)
class Round:
    """One migration during steady streams, none of which begins or ends meanwhile.

    Times are in seconds.

    Attributes:
        before: gaps between tokens before the migration.
        moving: gaps between tokens that overlap the migration.
        moving_s: duration of the migration.
        longest_step_s: longest step of any server during the migration, or of ten seconds if the
            migration is shorter.
        experts: number of experts loaded.
    """

    before: list[float]
    moving: list[float]
    moving_s: float
    longest_step_s: float
    experts: int


@dataclasses.dataclass(frozen=True)
class Pause:
    """All rounds of section `pause`."""

    rounds: list[Round]

    def gaps(self, when: str) -> np.ndarray:
        """Return the gaps between tokens of all rounds, in seconds; `when` is before or moving."""
        return np.concatenate([getattr(each, when) for each in self.rounds])

    @property
    def median_s(self) -> float:
        """Median step before migrations: the median gap, as a step gives each stream a token."""
        return float(np.median(self.gaps("before")))


def pause(setting: Setting) -> Pause:
    """Run the section `pause`: experts move between the placements for the two phases.

    The client gives the placements, because streams would end while a policy computes a placement.
    """

    async def run(api: Api) -> Pause:
        there = [(await placement(api))["servers"]]
        async with _streams(api, setting, 1):
            await asyncio.sleep(STEADY_S)
            await force(api)
        there.append((await placement(api))["servers"])
        return Pause([await _round(api, setting, n % 2, there[n % 2]) for n in range(ROUNDS)])

    return setting.serve("migrations during streams", 0, moving(0.0, PAUSE_HALF_LIFE_S), run)


async def _round(api: Api, setting: Setting, phase: int, servers: list[dict[str, Any]]) -> Round:
    """Run streams of a phase, move experts to `servers` meanwhile, and disconnect the streams."""
    async with _streams(api, setting, phase) as heard:
        begun_s = time.perf_counter()
        await asyncio.sleep(STEADY_S)
        moving_s = time.perf_counter()
        # Few samples, because this process reads the streams too.
        async with watched(api, every_s=WINDOW_S / 2) as samples:
            names, resident = ([server[k] for server in servers] for k in ("name", "resident"))
            decision = await put(api, names, resident)
            end_s = time.perf_counter()
            await asyncio.sleep(ASK_S)
    return Round(
        before=_gaps(heard, begun_s + STEADY_S / 2, moving_s),
        moving=_gaps(heard, moving_s, end_s),
        moving_s=end_s - moving_s,
        longest_step_s=_longest_s(samples),
        experts=decision["experts_moved"] if decision["migrate"] else 0,
    )


@contextlib.asynccontextmanager
async def _streams(api: Api, setting: Setting, phase: int) -> AsyncIterator[list[list[float]]]:
    """Stream answers to a phase's users during the block; yield the times of all tokens."""
    heard = list[list[float]]()

    async def stream(call: Call) -> None:
        origin = time.perf_counter()
        while True:
            times = list[float]()
            heard.append(times)
            hear = functools.partial(_hear, times)
            answer = await api.answer(call, origin, time.perf_counter() - origin, hear)
            if not answer.complete:
                raise RunError(f"a stream failed during a migration: {answer.error}")

    async with asyncio.TaskGroup() as group:
        calls = setting.askers.streams(setting.phases[phase], setting.streams)
        tasks = [group.create_task(stream(call)) for call in calls]
        yield heard
        for each in tasks:
            each.cancel()


def _hear(times: list[float], _: object) -> None:
    times.append(time.perf_counter())


def _longest_s(samples: Sequence[Sample]) -> float:
    """Return the seconds of the longest step since the first sample.

    A sample has the longest step of the last WINDOW_S, so earlier samples are ignored.
    """
    since_s = min(WINDOW_S, samples[-1].at_s)
    return max(max(each.longest_step_s) for each in samples if each.at_s >= since_s)


def _gaps(heard: Sequence[Sequence[float]], begin_s: float, end_s: float) -> list[float]:
    """Return the gaps between tokens, of all streams, that overlap a period."""
    return [
        later - earlier
        for times in heard
        for earlier, later in itertools.pairwise(times)
        if earlier < end_s and later > begin_s
    ]
