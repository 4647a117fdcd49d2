"""The sections: what is started, what it is asked, and what came of it."""

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
from benchmarks.serving.client import Api, Call
from benchmarks.serving.cluster import ClusterError
from benchmarks.serving.setting import progress
from dance_jax.engine.step_clock import WINDOW_S

SECTIONS = ("shift", "accumulate", "pause", "stable")
#: Prompts of each server, and tokens of each answer, that placements at the start are fitted to.
FIT_PROMPTS, FIT_TOKENS = 40, 32
#: Intervals of a phase of `shift`; of `stable` altogether.
INTERVALS, STABLE_INTERVALS = 4, 10
#: An interval has so many half-lives, as with the launcher's own defaults.
HALF_LIVES = 5
#: `pause`: seconds in which streams run before a migration, of which the first half is for their
#: prompts; half-life, migrations.
STEADY_S, PAUSE_HALF_LIFE_S, ROUNDS = 9.0, 4.0, 4

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every section works with.

    Attributes:
        place: where servers run.
        askers: who asks them.
        phases: each server's task, before and after the shift.
        requests: of each server in a phase.
        streams: of each server in section `pause`.
        interval_s: from one decision to the next.
        model: arguments of every launcher about the model.
        serving: arguments of those that serve.
        work: a directory for files in between.
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
        """Activations of a phase's tasks, of prompts that no user sends; counted once."""
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
        """What `run` finds with servers that start placed for a phase.

        Args:
            scheduling: the launcher's arguments about migration.
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
        """The same with a plan of requests."""

        async def run(api: Api) -> Watched:
            with progress(self.console, title, len(plan.calls)) as done:
                return await load(api, plan.calls, done, self.place.sent)

        return self.serve(title, phase, scheduling, run)


def still() -> list[str]:
    """Nothing moves."""
    return ["--rebalance-interval", "0"]


def moving(interval_s: float, half_life_s: float) -> list[str]:
    """Experts move; half_life_s 0: nothing that was counted fades."""
    return ["--rebalance-interval", f"{interval_s:.3f}", "--half-life", f"{half_life_s:.3f}"]


@dataclasses.dataclass(frozen=True)
class Shift:
    """One plan, and what became of it.

    Attributes:
        plan: of the runs `stay` and `move`.
        stay: servers stay as they are, placed for the first phase.
        move: they migrate.
        placed: servers placed for the second phase, which are asked that alone.
    """

    plan: Plan
    stay: Watched
    move: Watched
    placed: Watched


def shift(setting: Setting) -> Shift:
    """Section `shift`."""
    plan = setting.askers.plan(setting.phases, setting.requests)
    half_life_s = setting.interval_s / HALF_LIVES
    return Shift(
        plan,
        setting.ask("no migration", 0, still(), plan),
        setting.ask("migration", 0, moving(setting.interval_s, half_life_s), plan),
        setting.ask("placed for the second phase", 1, still(), plan.after(plan.shift_s)),
    )


def accumulate(setting: Setting) -> Watched:
    """Section `accumulate`: the plan of `shift`."""
    plan = setting.askers.plan(setting.phases, setting.requests)
    title = "migration, statistics that never fade"
    return setting.ask(title, 0, moving(setting.interval_s, 0.0), plan)


def stable(setting: Setting) -> Watched:
    """Section `stable`."""
    per_interval = setting.requests / INTERVALS
    plan = setting.askers.plan(setting.phases[:1], round(STABLE_INTERVALS * per_interval))
    half_life_s = setting.interval_s / HALF_LIVES
    return setting.ask("a stable workload", 0, moving(setting.interval_s, half_life_s), plan)


@dataclasses.dataclass(frozen=True)
class Round:
    """One migration beside steady streams, none of which begins or ends in it; times in seconds.

    Attributes:
        before, moving: gaps between tokens, before it and those that overlap it.
        moving_s: how long it took.
        longest_step_s: of any server meanwhile; if that took less than ten seconds, of ten.
        experts: that were loaded.
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
        """Gaps between tokens of all rounds, in seconds: before or moving."""
        return np.concatenate([getattr(each, when) for each in self.rounds])

    @property
    def median_s(self) -> float:
        """Of the steps before migrations: each gives every stream a token."""
        return float(np.median(self.gaps("before")))


def pause(setting: Setting) -> Pause:
    """Section `pause`: experts go to and fro between what was placed for the two phases' tasks.

    They are told where to go, as nothing is solved then: streams run out while a policy looks.
    """

    async def run(api: Api) -> Pause:
        there = [(await placement(api))["servers"]]
        async with _streams(api, setting, 1):
            await asyncio.sleep(STEADY_S)
            await force(api)
        there.append((await placement(api))["servers"])
        return Pause([await _round(api, setting, n % 2, there[n % 2]) for n in range(ROUNDS)])

    return setting.serve("migrations beside streams", 0, moving(0.0, PAUSE_HALF_LIFE_S), run)


async def _round(api: Api, setting: Setting, phase: int, servers: list[dict[str, Any]]) -> Round:
    """Streams of a phase run, experts move, and the streams are hung up on."""
    async with _streams(api, setting, phase) as heard:
        begun_s = time.perf_counter()
        await asyncio.sleep(STEADY_S)
        moving_s = time.perf_counter()
        # Not often: streams are read in this process too.
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
    """Users of a phase read answers without end while the block runs; when each token came."""
    heard = list[list[float]]()

    async def stream(call: Call) -> None:
        origin = time.perf_counter()
        while True:
            times = list[float]()
            heard.append(times)
            hear = functools.partial(_hear, times)
            answer = await api.answer(call, origin, time.perf_counter() - origin, hear)
            if not answer.good:
                raise ClusterError(f"a stream beside a migration: {answer.error}")

    async with asyncio.TaskGroup() as group:
        calls = setting.askers.streams(setting.phases[phase], setting.streams)
        tasks = [group.create_task(stream(call)) for call in calls]
        yield heard
        for each in tasks:
            each.cancel()


def _hear(times: list[float], _: object) -> None:
    times.append(time.perf_counter())


def _longest_s(samples: Sequence[Sample]) -> float:
    """Seconds of the longest step since the first sample; each knows those of WINDOW_S."""
    since_s = min(WINDOW_S, samples[-1].at_s)
    return max(max(each.longest_step_s) for each in samples if each.at_s >= since_s)


def _gaps(heard: Sequence[Sequence[float]], begin_s: float, end_s: float) -> list[float]:
    """Gaps between tokens of all streams, those that overlap a time."""
    return [
        later - earlier
        for times in heard
        for earlier, later in itertools.pairwise(times)
        if earlier < end_s and later > begin_s
    ]
