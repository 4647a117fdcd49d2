"""Four streams, and a long prompt that arrives beside them."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.targets import Target

from .client import Answer, Call
from .figures import Spread, gaps_s
from .setting import Setting, failures

STREAMS = 4
#: Tokens: of the long prompt; of a stream's prompt and answer.
LONG, SHORT, ANSWER = 1500, 32, 200
#: Pieces that every stream has got when the long prompt arrives.
SETTLED = 40
#: Runs of each server and of each way the others are busy.
REPEATS = 3
#: p99 of the streams' ITLs over their median.
RATIO = 3.0


@dataclasses.dataclass(frozen=True)
class Row:
    """The four streams of one server, in runs with a long prompt."""

    server: str
    #: The other servers had a stream each.
    others_busy: bool
    #: All ITLs from the moment when all streams run.
    itl: Spread | None
    #: Those that overlap the time from the long prompt's arrival to its first token.
    beside: Spread | None
    #: TTFT of the long prompt.
    ttft: Spread | None
    failed: list[str]

    @property
    def busy_word(self) -> str:
        """What the other servers did."""
        return "busy" if self.others_busy else "idle"

    @property
    def ratio(self) -> float:
        """p99 over median of all ITLs."""
        return self.itl.p99 / self.itl.p50 if self.itl else float("nan")


@dataclasses.dataclass(frozen=True)
class Run:
    """One time."""

    streams: list[Answer]
    long: Answer
    failed: list[str]

    @property
    def gaps(self) -> list[float]:
        """ITLs of the streams once all of them run."""
        return gaps_s(self.streams, self._settled_s)

    @property
    def gaps_beside(self) -> list[float]:
        """Those that overlap the long prompt's prefill."""
        if not self.long.piece_s:
            return []
        return [
            later - earlier
            for stream in self.streams
            for earlier, later in itertools.pairwise(stream.piece_s)
            if earlier < self.long.piece_s[0] and later > self.long.asked_s
        ]

    @property
    def _settled_s(self) -> float:
        return max((stream.piece_s[0] for stream in self.streams if stream.piece_s), default=0.0)


async def measure(setting: Setting) -> list[Row]:
    """Each server, with the others idle and, where there are any, busy."""
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
        ttft=Spread.of(run.long.piece_s[0] - run.long.asked_s for run in runs if run.long.piece_s),
        failed=[error for run in runs for error in run.failed],
    )


async def _run(setting: Setting, server: int, busy: bool, rng: np.random.Generator) -> Run:
    """One run: the long prompt comes when all streams of its server are well under way."""
    origin = time.perf_counter()
    settled, under_way = asyncio.Event(), 0

    async def stream(own: int) -> Answer:
        def heard(pieces: int) -> None:
            nonlocal under_way
            under_way += own == server and pieces == SETTLED
            if under_way == STREAMS:
                settled.set()

        call = Call(own, setting.texts.cut(own, SHORT, rng), ANSWER)
        try:
            return await setting.api.answer(call, origin, 0.0, heard)
        finally:
            settled.set()  # one that failed early must not be waited for

    others = [other for other in setting.servers if other != server] if busy else []
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(stream(own)) for own in [*[server] * STREAMS, *others]]
        await settled.wait()
        call = Call(server, setting.texts.cut(server, LONG, rng), 1)
        long = await setting.api.answer(call, origin, time.perf_counter() - origin)
    answers = [task.result() for task in tasks]
    return Run(answers[:STREAMS], long, failures([*answers, long]))


def targets(rows: list[Row] | None) -> Iterator[Target]:
    """What has to be reached; None: not measured."""
    found = [(row.ratio, f"{row.server}, others {row.busy_word}") for row in rows or []]
    yield Target.of_worst("long: p99 ITL of four streams, of its median", RATIO, found)
    failed = [error for row in rows or [] for error in row.failed]
    count = None if rows is None else float(len(failed))
    yield Target("long: failed requests", 0.0, count, failed[0] if failed else "")
