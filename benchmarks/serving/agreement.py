"""Whether two greedy answers to one prompt are the same, and if not, how close the choice was."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from .client import Token


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first one between two answers; what follows it says nothing."""

    #: Token from which on they differ.
    index: int
    #: Logprob of the most likely token there less that of the next: the larger of both answers'.
    margin: float


def first_difference(ours: Sequence[Token], theirs: Sequence[Token]) -> Difference | None:
    """None: they are the same. Answers of different length differ at any margin."""
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine.text != other.text:
            return Difference(index, max(margin(mine), margin(other)))
    if len(ours) != len(theirs):
        return Difference(min(len(ours), len(theirs)), math.inf)
    return None


def margin(token: Token) -> float:
    """Between the two most likely tokens; infinite where two are not known."""
    first, second, *_ = [*sorted(token.top.values(), reverse=True), -math.inf, -math.inf]
    return first - second if math.isfinite(second) else math.inf
