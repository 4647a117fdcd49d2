"""Arrivals of requests: time, server and lengths; from a Poisson process or a trace."""

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

#: Distribution of answer lengths in tokens if no trace gives them: lognormal, with a median between
#: those of the two services in Azure's trace of 2023 (13 and 129 tokens).
MEDIAN_TOKENS, SPREAD = 60, 1.0
_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclasses.dataclass(frozen=True, order=True)
class Arrival:
    """Arrival of one request; lengths are in tokens, or None if not given."""

    #: Seconds after the run's start.
    at_s: float
    server: int
    prompt_tokens: int | None = None
    output_tokens: int | None = None


def poisson(rates: Sequence[float], seed: int) -> Iterator[Arrival]:
    """Yield arrivals at all servers in the order of time, without end.

    Args:
        rates: requests per second of each server; 0 for none.
        seed: a server's arrivals depend only on the seed, its rate and its index.
    """
    return heapq.merge(*(_one(rate, server, seed) for server, rate in enumerate(rates) if rate > 0))


def _one(rate: float, server: int, seed: int) -> Iterator[Arrival]:
    rng = np.random.default_rng((seed, server))
    at_s = 0.0
    while True:
        at_s += rng.exponential(1 / rate)
        yield Arrival(at_s, server)


def read_trace(path: pathlib.Path, servers: int, speedup: float = 1.0) -> list[Arrival]:
    """Read a trace in Azure's format and assign its requests to the servers in turn.

    Args:
        path: CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens.
        servers: number of servers.
        speedup: factor by which arrivals come faster.

    Raises:
        UserError: the file cannot be read, or a line is wrong.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not set(_COLUMNS) <= set(rows.fieldnames or ()):
                raise UserError(
                    f"{path}: the columns of a trace must include {', '.join(_COLUMNS)}"
                )
            found = [_row(row, f"{path}:{number}") for number, row in enumerate(rows, 2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: the trace cannot be read: {error}") from error
    if not found:
        raise UserError(f"{path}: the trace has no arrivals")
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
            raise ValueError("lengths must be at least 1 token")
        return datetime.datetime.fromisoformat(at), prompt, output
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: not an arrival: {error}") from error


def limited(
    arrivals: Iterable[Arrival], requests: int | None = None, duration_s: float | None = None
) -> list[Arrival]:
    """Return the first `requests` arrivals within `duration_s`; None means no limit."""
    within = itertools.takewhile(
        lambda arrival: duration_s is None or arrival.at_s <= duration_s, arrivals
    )
    return list(itertools.islice(within, requests))


def answer_lengths(count: int, longest: int, rng: np.random.Generator) -> list[int]:
    """Draw `count` lengths of answers in tokens, from 1 to `longest`."""
    drawn = np.rint(rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, count))
    return drawn.clip(1, longest).astype(int).tolist()
