"""Section `long`: inter-token latency of four streams while a long prompt arrives."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.targets import Target
from dance_jax.bench.client import Answer, Call
from dance_jax.bench.figures import Spread, failures, gaps_s

from .setting import Setting

STREAMS = 4
#: Tokens of the long prompt, of a stream's prompt, and of a stream's answer.
LONG, SHORT, ANSWER = 1500, 32, 200
#: Pieces that every stream has received when the long prompt arrives.
SETTLED = 40
#: Runs per server, both with idle and with busy other servers.
REPEATS = 3
#: Target: p99 of the streams' ITLs over their median.
RATIO = 3.0


@dataclasses.dataclass(frozen=True)
class Row:
    """Results of one server's four streams beside a long prompt, over all its runs."""

    server: str
    #: Whether each of the other servers had a stream too.
    others_busy: bool
    #: ITLs from the moment when all streams run.
    itl: Spread | None
    #: ITLs that overlap the time from the long prompt's arrival to its first token.
    beside: Spread | None
    #: TTFT of the long prompt.
    ttft: Spread | None
    failed: list[str]

    @property
    def busy_word(self) -> str:
        """Whether the other servers were busy or idle, as a word."""
        return "busy" if self.others_busy else "idle"

    @property
    def ratio(self) -> float:
        """The p99 of all ITLs over their median."""
        return self.itl.p99 / self.itl.p50 if self.itl else float("nan")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run with a long prompt."""

    streams: list[Answer]
    long: Answer
    failed: list[str]

    @property
    def gaps(self) -> list[float]:
        """ITLs of the streams from the moment when all of them run."""
        return gaps_s(self.streams, self._settled_s)

    @property
    def gaps_beside(self) -> list[float]:
        """ITLs that overlap the long prompt's prefill."""
        if not self.long.piece_s:
            return []
        return [
            later - earlier
            for stream in self.streams
            for earlier, later in itertools.pairwise(stream.piece_s)
            if earlier < self.long.piece_s[0] and later > self.long.due_s
        ]

    @property
    def _settled_s(self) -> float:
        return max((stream.piece_s[0] for stream in self.streams if stream.piece_s), default=0.0)


async def measure(setting: Setting) -> list[Row]:
    """Measure each server with the other servers idle and, if there are others, busy."""
    setting.need(LONG + ANSWER, "long")
    rng = setting.rng("long")
    ways = (False, True) if len(setting.names) > 1 else (False,)
    rows = []
    with setting.progress("long", len(setting.names) * len(ways) * REPEATS) as done:
        for server in setting.servers:
            for busy in ways:
                runs = []
                for _ in range(REPEATS):
                    runs.append(await _run(setting, server, busy, rng))
                    done()
                rows.append(_row(setting.names[server], busy, runs))
    return rows


def _row(server: str, busy: bool, runs: list[Run]) -> Row:
    return Row(
        server=server,
        others_busy=busy,
        itl=Spread.of(gap for run in runs for gap in run.gaps),
        beside=Spread.of(gap for run in runs for gap in run.gaps_beside),
        ttft=Spread.of(run.long.piece_s[0] - run.long.due_s for run in runs if run.long.piece_s),
        failed=[error for run in runs for error in run.failed],
    )


async def _run(setting: Setting, server: int, busy: bool, rng: np.random.Generator) -> Run:
    """Make one run; the long prompt arrives when all streams of its server are well under way."""
    origin = time.perf_counter()
    settled, under_way = asyncio.Event(), 0

    async def stream(own: int) -> Answer:
        def on_piece(pieces: int) -> None:
            nonlocal under_way
            under_way += own == server and pieces == SETTLED
            if under_way == STREAMS:
                settled.set()

        call = Call(own, setting.texts.cut(own, SHORT, rng), ANSWER)
        try:
            return await setting.api.answer(call, origin, 0.0, on_piece)
        finally:
            settled.set()  # do not wait for a stream that failed early

    others = [other for other in setting.servers if other != server] if busy else []
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(stream(own)) for own in [*[server] * STREAMS, *others]]
        await settled.wait()
        call = Call(server, setting.texts.cut(server, LONG, rng), 1)
        long = await setting.api.answer(call, origin, time.perf_counter() - origin)
    answers = [task.result() for task in tasks]
    return Run(answers[:STREAMS], long, failures([*answers, long]))


def targets(rows: list[Row] | None) -> Iterator[Target]:
    """Yield the targets of the section; `rows` is None if it was not measured."""
    found = [(row.ratio, f"{row.server}, others {row.busy_word}") for row in rows or []]
    yield Target.of_worst("long: p99 ITL of four streams, over the median ITL", RATIO, found)
    failed = [error for row in rows or [] for error in row.failed]
    count = None if rows is None else float(len(failed))
    yield Target("long: failed requests", 0.0, count, failed[0] if failed else "")
