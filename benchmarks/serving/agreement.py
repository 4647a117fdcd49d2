"""Compare two greedy answers to a prompt: the first difference, and how close the choice was."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from dance_jax.bench.client import Token


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first difference between two answers; later tokens are not comparable."""

    #: Index of the first token that differs.
    index: int
    #: Logprob of the most likely token there minus that of the second; the larger of both answers.
    margin: float


def first_difference(ours: Sequence[Token], theirs: Sequence[Token]) -> Difference | None:
    """Return the first difference, or None if the answers are the same.

    Answers of which one is the beginning of the other differ with an infinite margin.
    """
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine.text != other.text:
            return Difference(index, max(margin(mine), margin(other)))
    if len(ours) != len(theirs):
        return Difference(min(len(ours), len(theirs)), math.inf)
    return None


def margin(token: Token) -> float:
    """Return the margin between the two most likely tokens; infinite if only one is known."""
    first, second, *_ = [*sorted(token.top.values(), reverse=True), -math.inf, -math.inf]
    return first - second if math.isfinite(second) else math.inf
