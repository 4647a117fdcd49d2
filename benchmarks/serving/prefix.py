"""Section `prefix`: TTFT of a second prompt that begins like a first one (prefix cache)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.targets import Target
from dance_jax.bench.client import Call
from dance_jax.bench.figures import failures

from .setting import Setting

#: Tokens that both prompts share, of each prompt's own end, and of an answer.
SHARED, TAIL, ANSWER = 1000, 24, 4
#: Pairs of prompts per server.
REPEATS = 5
#: Target: second TTFT over the first.
SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Pair:
    """TTFT of two prompts, sent one after the other, in seconds."""

    server: str
    first: float
    second: float


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Results of the section."""

    pairs: list[Pair]
    #: Reasons of failed requests.
    failed: list[str]

    @property
    def share(self) -> float:
        """The median ratio of the second TTFT to the first."""
        shares = [pair.second / pair.first for pair in self.pairs]
        return float(np.median(shares)) if shares else float("nan")


async def measure(setting: Setting) -> Prefix:
    """Measure pairs of prompts on otherwise idle servers; every pair has its own beginning."""
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
    if all(answer.complete and answer.piece_s for answer in answers):
        first, second = (answer.piece_s[0] - answer.due_s for answer in answers)
        found.pairs.append(Pair(setting.names[server], first, second))


def targets(found: Prefix | None) -> Iterator[Target]:
    """Yield the targets of the section; `found` is None if it was not measured."""
    share = None if found is None else found.share
    where = f"median of {len(found.pairs)}" if found else ""
    yield Target(
        "prefix: TTFT of a prompt with a cached beginning, over the first prompt's",
        SHARE,
        share,
        where,
    )
    failed = found.failed if found else []
    count = None if found is None else float(len(failed))
    yield Target("prefix: failed requests", 0.0, count, failed[0] if failed else "")
