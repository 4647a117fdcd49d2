"""When requests arrive, where, and how long they are."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import heapq
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dance_jax.config import UserError

#: Lengths of answers where no trace gives them, in tokens: lognormal, between those of the two
#: services in Azure's trace of 2023 (medians of 13 and 129 tokens).
MEDIAN_TOKENS, SPREAD = 60, 1.0
_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclasses.dataclass(frozen=True, order=True)
class Arrival:
    """One request; lengths in tokens, None: nothing says."""

    #: Seconds after the start.
    at_s: float
    server: int
    prompt_tokens: int | None = None
    output_tokens: int | None = None


def poisson(rates: Sequence[float], seed: int) -> Iterator[Arrival]:
    """Arrivals of all servers in their order, without end.

    Args:
        rates: of each server, requests per second; 0: none.
        seed: a server's arrivals depend on it and on the server alone.
    """
    return heapq.merge(*(_one(rate, server, seed) for server, rate in enumerate(rates) if rate > 0))


def _one(rate: float, server: int, seed: int) -> Iterator[Arrival]:
    rng = np.random.default_rng((seed, server))
    at_s = 0.0
    while True:
        at_s += rng.exponential(1 / rate)
        yield Arrival(at_s, server)


def read_trace(path: pathlib.Path, servers: int, speedup: float = 1.0) -> list[Arrival]:
    """A trace of Azure's form: TIMESTAMP, ContextTokens, GeneratedTokens; dealt to servers in turn.

    Args:
        speedup: arrivals come so many times as fast.

    Raises:
        UserError: it cannot be read, or a line is wrong.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not set(_COLUMNS) <= set(rows.fieldnames or ()):
                raise UserError(f"{path}: the columns {', '.join(_COLUMNS)} are needed")
            found = [_row(row, f"{path}:{number}") for number, row in enumerate(rows, 2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: the trace cannot be read: {error}") from error
    if not found:
        raise UserError(f"{path}: no arrivals")
    found.sort()
    begin = found[0][0]
    return [
        Arrival((at - begin).total_seconds() / speedup, number % servers, prompt, output)
        for number, (at, prompt, output) in enumerate(found)
    ]


def _row(row: dict[str, str], where: str) -> tuple[datetime.datetime, int, int]:
    try:
        at, *lengths = (row[column] for column in _COLUMNS)
        prompt, output = map(int, lengths)
        if min(prompt, output) < 1:
            raise ValueError("lengths are 1 token at least")
        return datetime.datetime.fromisoformat(at), prompt, output
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: no arrival: {error}") from error


def limited(
    arrivals: Iterable[Arrival], requests: int | None = None, duration_s: float | None = None
) -> list[Arrival]:
    """The first `requests` of them, and only those within `duration_s`; None: no limit."""
    within = itertools.takewhile(
        lambda arrival: duration_s is None or arrival.at_s <= duration_s, arrivals
    )
    return list(itertools.islice(within, requests))


def answer_lengths(count: int, longest: int, rng: np.random.Generator) -> list[int]:
    """Lengths of answers in tokens, from 1 to `longest`."""
    drawn = np.rint(rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, count))
    return drawn.clip(1, longest).astype(int).tolist()
