"""Figures of servers from their answers: times, rates, failures."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from dance_jax.bench.client import Answer

ALL = "all"


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and percentiles of some times, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Return the spread of some values, or None if there are no values."""
        found = np.fromiter(values, float)
        if not found.size:
            return None
        p50, p90, p99 = np.percentile(found, [50, 90, 99]).tolist()
        return cls(float(found.mean()), p50, p90, p99, found.size)


@dataclasses.dataclass(frozen=True)
class Figures:
    """Figures of one server, or of all servers."""

    server: str
    requests: int
    failed: int
    #: Seconds from the first arrival to the end of the last answer.
    seconds: float
    prompt_tokens: int
    output_tokens: int
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None

    @classmethod
    def of(cls, server: str, answers: Sequence[Answer]) -> Figures:
        """Compute the figures from answers; times and tokens count only complete answers."""
        complete = [answer for answer in answers if answer.complete]
        begin = min((answer.due_s for answer in answers), default=0.0)
        end = max((answer.end_s for answer in answers), default=0.0)
        return cls(
            server=server,
            requests=len(answers),
            failed=sum(answer.error is not None for answer in answers),
            seconds=end - begin,
            prompt_tokens=sum(answer.prompt_tokens for answer in complete),
            output_tokens=sum(answer.output_tokens for answer in complete),
            ttft=Spread.of(first_token_s(complete)),
            tpot=Spread.of(per_token_s(complete)),
            itl=Spread.of(gaps_s(complete)),
            e2e=Spread.of(answer.end_s - answer.due_s for answer in complete),
        )

    def rate(self, count: int) -> float:
        """Return `count` per second of the run."""
        return count / self.seconds if self.seconds else 0.0

    @property
    def output_rate(self) -> float:
        """Output tokens per second."""
        return self.rate(self.output_tokens)

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.rate(self.prompt_tokens)

    @property
    def request_rate(self) -> float:
        """Requests that did not fail, per second."""
        return self.rate(self.requests - self.failed)


def by_server(names: Sequence[str], answers: Sequence[Answer]) -> list[Figures]:
    """Return the figures of each server and, if there are several servers, of all together."""
    rows = [
        Figures.of(name, [answer for answer in answers if answer.call.server == server])
        for server, name in enumerate(names)
    ]
    return [*rows, Figures.of(ALL, answers)] if len(names) > 1 else rows


def first_token_s(answers: Iterable[Answer]) -> list[float]:
    """Return the TTFT of each answer that has a first token."""
    return [answer.piece_s[0] - answer.due_s for answer in answers if answer.piece_s]


def per_token_s(answers: Iterable[Answer]) -> list[float]:
    """Return the TPOT of each answer that has several pieces."""
    return [
        (answer.piece_s[-1] - answer.piece_s[0]) / (answer.output_tokens - 1)
        for answer in answers
        if len(answer.piece_s) > 1 and answer.output_tokens > 1
    ]


def gaps_s(answers: Iterable[Answer], after_s: float = 0.0) -> list[float]:
    """Return the ITLs of all answers, counting gaps that begin at `after_s` or later."""
    return [
        later - earlier
        for answer in answers
        for earlier, later in itertools.pairwise(answer.piece_s)
        if earlier >= after_s
    ]


def failures(answers: Iterable[Answer]) -> list[str]:
    """Return the reasons of failed answers; answers whose user disconnected do not count."""
    return [answer.error for answer in answers if answer.error is not None]
