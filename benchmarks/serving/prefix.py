"""A second prompt that begins as a first one did."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.targets import Target

from .client import Call
from .setting import Setting, failures

#: Tokens: shared by both prompts, of each one's own end, of an answer.
SHARED, TAIL, ANSWER = 1000, 24, 4
#: Pairs of prompts of each server.
REPEATS = 5
#: Second TTFT over the first.
SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two prompts, one after the other; seconds."""

    server: str
    first: float
    second: float


@dataclasses.dataclass(frozen=True)
class Prefix:
    pairs: list[Pair]
    failed: list[str]

    @property
    def share(self) -> float:
        """Second TTFT over the first: median."""
        shares = [pair.second / pair.first for pair in self.pairs]
        return float(np.median(shares)) if shares else float("nan")


async def measure(setting: Setting) -> Prefix:
    """Nothing else runs meanwhile; every pair has a beginning of its own."""
    setting.need(SHARED + TAIL + ANSWER, "prefix")
    rng = setting.rng("prefix")
    found = Prefix([], [])
    with setting.progress("prefix", len(setting.names) * REPEATS) as done:
        for _ in range(REPEATS):
            for server in setting.servers:
                await _pair(setting, server, found, rng)
                done()
    return found


async def _pair(setting: Setting, server: int, found: Prefix, rng: np.random.Generator) -> None:
    shared = setting.texts.cut(server, SHARED, rng)
    tails = [setting.texts.cut(server, TAIL, rng) for _ in range(2)]
    origin = time.perf_counter()
    answers = []
    for tail in tails:
        call = Call(server, shared + tail, ANSWER)
        answers.append(await setting.api.answer(call, origin, time.perf_counter() - origin))
    found.failed.extend(failures(answers))
    if all(answer.good and answer.piece_s for answer in answers):
        first, second = (answer.piece_s[0] - answer.asked_s for answer in answers)
        found.pairs.append(Pair(setting.names[server], first, second))


def targets(found: Prefix | None) -> Iterator[Target]:
    """What has to be reached; None: not measured."""
    share = None if found is None else found.share
    where = f"median of {len(found.pairs)}" if found else ""
    yield Target(
        "prefix: TTFT of a prompt with a known beginning, of the first's", SHARE, share, where
    )
    failed = found.failed if found else []
    count = None if found is None else float(len(failed))
    yield Target("prefix: failed requests", 0.0, count, failed[0] if failed else "")
