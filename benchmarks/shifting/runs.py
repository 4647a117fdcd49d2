"""The sections: what is started, what it is asked, and what came of it."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import numpy as np
from rich.console import Console

from benchmarks.live.places import Place, count_activations
from benchmarks.live.tasks import Askers, Plan, Task, write_fit
from benchmarks.live.watch import (
    ASK_S,
    Sample,
    Watched,
    decide,
    load,
    moved,
    placement,
    sample,
    watched,
)
from benchmarks.serving.client import Answer, Api, Call
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
#: `pause`: seconds of decoding before a migration, half-life then, streams of a server, times.
STEADY_S, PAUSE_HALF_LIFE_S, STREAMS, ROUNDS = 12.0, 4.0, 4, 4

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every section works with.

    Attributes:
        place: where servers run.
        askers: who asks them.
        phases: each server's task, before and after the shift.
        requests: of each server in a phase.
        interval_s: from one decision to the next.
        model: arguments of every launcher about the model.
        serving: arguments of those that serve.
        work: a directory for files in between.
    """

    place: Place
    askers: Askers
    phases: tuple[tuple[Task, ...], tuple[Task, ...]]
    requests: int
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
    """One migration beside steady streams; times in seconds.

    No gap in which the prompt of a stream is computed counts: one whose answer is complete begins
    again, which has nothing to do with migrations.

    Attributes:
        before: gaps between tokens, before it: of a step, and what passes it on.
        solving: those that overlap the time until it is decided what moves.
        moving: those that overlap the time in which it does.
        solving_s, moving_s: those times.
        longest_before_s, longest_solving_s: steps of any server, in the last ten seconds of the
            time before and of that in which it was decided.
        longest_step_s: while experts moved; if that took less than ten seconds, of ten.
        experts: that were loaded.
    """

    before: list[float]
    solving: list[float]
    moving: list[float]
    solving_s: float
    moving_s: float
    longest_before_s: float
    longest_solving_s: float
    longest_step_s: float
    experts: int


@dataclasses.dataclass(frozen=True)
class Pause:
    """All rounds of section `pause`."""

    rounds: list[Round]

    def gaps(self, when: str) -> np.ndarray:
        """Gaps between tokens of all rounds, in seconds: before, solving or moving."""
        return np.concatenate([getattr(each, when) for each in self.rounds])

    @property
    def median_s(self) -> float:
        """Of the steps before migrations: each gives every stream a token."""
        return float(np.median(self.gaps("before")))


def pause(setting: Setting) -> Pause:
    """Section `pause`: users swap the two phases' tasks from round to round."""

    async def run(api: Api) -> Pause:
        return Pause([await _round(api, setting, number) for number in range(ROUNDS)])

    return setting.serve("migrations beside streams", 0, moving(0.0, PAUSE_HALF_LIFE_S), run)


async def _round(api: Api, setting: Setting, number: int) -> Round:
    """Streams run, experts are moved, and the streams are hung up on."""
    calls = setting.askers.streams(setting.phases[1 - number % 2], STREAMS)
    origin, heard, begun = time.perf_counter(), list[list[float]](), list[list[float]]()
    version = (await placement(api))["version"]

    def now() -> float:
        return time.perf_counter() - origin

    async def ask(call: Call) -> Answer:
        times, asked = list[float](), [now()]
        heard.append(times)
        begun.append(asked)

        def hear(_: object) -> None:
            times.append(now())
            if len(times) == 1:
                asked.append(times[0])

        return await api.answer(call, origin, now(), hear)

    async def stream(call: Call) -> None:
        while (answer := await ask(call)).good:
            pass
        raise ClusterError(f"a stream beside a migration: {answer.error}")

    async with asyncio.TaskGroup() as group:
        streams = [group.create_task(stream(call)) for call in calls]
        await asyncio.sleep(STEADY_S)
        before, begin_s = await sample(api, origin), now()
        decision = await decide(api)
        decided_s = now()
        async with watched(api) as samples:
            if decision["migrate"]:
                await moved(api, version)
            end_s = now()
            await asyncio.sleep(ASK_S)
        for each in streams:
            each.cancel()
    return Round(
        before=_gaps(heard, begun, STEADY_S / 3, begin_s),
        solving=_gaps(heard, begun, begin_s, decided_s),
        moving=_gaps(heard, begun, decided_s, end_s),
        solving_s=decided_s - begin_s,
        moving_s=end_s - decided_s,
        longest_before_s=max(before.longest_step_s),
        longest_solving_s=max(samples[0].longest_step_s),
        longest_step_s=_longest_s(samples),
        experts=decision["experts_moved"] if decision["migrate"] else 0,
    )


def _longest_s(samples: Sequence[Sample]) -> float:
    """Seconds of the longest step since the first sample; each knows those of WINDOW_S."""
    since_s = min(WINDOW_S + ASK_S, samples[-1].at_s)
    return max(max(each.longest_step_s) for each in samples if each.at_s >= since_s)


def _gaps(
    heard: Sequence[Sequence[float]],
    begun: Sequence[Sequence[float]],
    begin_s: float,
    end_s: float,
) -> list[float]:
    """Gaps between tokens of all streams, those that overlap a time.

    Args:
        begun: of each stream when it was asked for and when its first token came; gaps that overlap
            the time between are left out.
    """
    prompts = [times for times in begun if len(times) == 2]
    return [
        later - earlier
        for times in heard
        for earlier, later in itertools.pairwise(times)
        if earlier < end_s
        and later > begin_s
        and not any(earlier < first and later > asked for asked, first in prompts)
    ]
