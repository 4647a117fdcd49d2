"""Section `static`: continuous batching against one batch at a time, on the same servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.targets import Target
from dance_jax.bench import arrivals
from dance_jax.bench.arrivals import Arrival
from dance_jax.bench.client import Answer, Call
from dance_jax.bench.drive import open_loop
from dance_jax.bench.figures import Figures, failures, first_token_s

from .gates import Batch, gated
from .setting import Setting

#: Requests of each server at saturation, as a multiple of the sequences that it runs at once.
TURNS = 4
#: Rates to try, as fractions of the requests per second that batches reach at saturation.
FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
#: Tokens of the longest answer; minimum and maximum tokens of prompts.
LONGEST, PROMPTS = 256, (32, 256)
#: Targets over static batches: maximum ratio of the p99 TTFT, minimum ratio of the throughput.
TTFT_SHARE, THROUGHPUT_RATIO = 1 / 3, 2.0


@dataclasses.dataclass(frozen=True)
class Saturated:
    """Throughput at saturation: while requests wait on every server."""

    #: Output tokens per second.
    token_rate: float
    #: Seconds of saturation.
    seconds: float


@dataclasses.dataclass(frozen=True)
class Static:
    """Results of the section: `batches` is one batch at a time, `ours` continuous batching."""

    saturated_batches: Saturated
    saturated_ours: Saturated
    #: Total requests per second that batches reach at saturation.
    capacity: float
    #: Highest fraction of `capacity` that batches sustained; None if they sustained none.
    fraction: float | None
    #: Figures at that rate.
    batches: Figures | None
    ours: Figures | None
    #: TTFT of every request at that rate, in seconds.
    ttft_batches: list[float]
    ttft_ours: list[float]
    #: Reasons of failed requests.
    failed: list[str]

    @property
    def rate(self) -> float | None:
        """Highest total rate that batches sustained, in requests per second."""
        return None if self.fraction is None else self.fraction * self.capacity


async def measure(setting: Setting, window_s: float) -> Static:
    """Measure both ways of batching at saturation, and at the highest rate that batches sustain.

    Args:
        setting: the servers and texts.
        window_s: seconds during which requests arrive, for each rate.
    """
    setting.need(LONGEST + PROMPTS[1], "static")
    at_once = [Arrival(0.0, n) for n in setting.servers for _ in range(TURNS * setting.rows[n])]
    batched, _ = await _batches(setting, at_once, "static: batches, all waiting")
    ours = await _ours(setting, at_once, "static: continuous, all waiting")
    end_s = max(answer.end_s for answer in batched)
    until_s = saturated_until(ours)
    capacity = len(batched) / end_s
    failed = failures([*batched, *ours])
    fraction, slow, fast = None, [], []
    for tried in FRACTIONS:
        coming = _arrivals(setting, tried * capacity, window_s)
        title = f"static: batches at {tried * capacity:.2f} requests/s"
        slow, batches = await _batches(setting, coming, title)
        failed += failures(slow)
        if sustained(batches, window_s):
            fraction = tried
            fast = await _ours(setting, coming, "static: continuous at that rate")
            failed += failures(fast)
            break
    return Static(
        saturated_batches=Saturated(token_rate(batched, end_s), end_s),
        saturated_ours=Saturated(token_rate(ours, until_s), until_s),
        capacity=capacity,
        fraction=fraction,
        batches=Figures.of("batches", slow) if fraction else None,
        ours=Figures.of("continuous", fast) if fraction else None,
        ttft_batches=first_token_s(slow) if fraction else [],
        ttft_ours=first_token_s(fast),
        failed=failed,
    )


def sustained(batches: Sequence[Batch], window_s: float) -> bool:
    """Return whether the first batch after the window took all waiting calls.

    If so, no queue has grown during the window.
    """
    return next((batch.left == 0 for batch in batches if batch.start_s >= window_s), True)


def _arrivals(setting: Setting, rate: float, window_s: float) -> list[Arrival]:
    """Draw arrivals at a total `rate`, split by the sequences that each server runs at once."""
    rates = [rate * rows / sum(setting.rows) for rows in setting.rows]
    return arrivals.limited(arrivals.poisson(rates, setting.seed), duration_s=window_s)


async def _batches(
    setting: Setting, coming: Sequence[Arrival], title: str
) -> tuple[list[Answer], list[Batch]]:
    calls = _calls(setting, coming, title)
    with setting.progress(title, len(calls)) as done:
        return await gated(setting.api, calls, setting.batch_rows, done)


async def _ours(setting: Setting, coming: Sequence[Arrival], title: str) -> list[Answer]:
    calls = _calls(setting, coming, title)
    with setting.progress(title, len(calls)) as done:
        return await open_loop(setting.api, calls, done)


def _calls(setting: Setting, coming: Sequence[Arrival], run: str) -> list[Call]:
    """Make calls with the same lengths in every run, but new texts, so that caches miss."""
    lengths, words = setting.rng("static: lengths"), setting.rng(run)
    outputs = arrivals.answer_lengths(len(coming), LONGEST, lengths)
    prompts = lengths.integers(*PROMPTS, len(coming), endpoint=True).tolist()
    return [
        Call(each.server, setting.texts.cut(each.server, prompt, words), output, each.at_s)
        for each, prompt, output in zip(coming, prompts, outputs, strict=True)
    ]


def saturated_until(answers: Sequence[Answer]) -> float:
    """Return the second at which a server first had no more requests waiting for a first token."""
    last: dict[int, float] = {}
    for answer in answers:
        if answer.complete and answer.piece_s:
            server = answer.call.server
            last[server] = max(last.get(server, 0.0), answer.piece_s[0])
    return min(last.values(), default=0.0)


def token_rate(answers: Iterable[Answer], until_s: float) -> float:
    """Return the output tokens per second from the run's start until `until_s`.

    A piece may have several tokens, so an answer's tokens count evenly over its pieces.
    """
    tokens = sum(
        answer.output_tokens
        * sum(moment <= until_s for moment in answer.piece_s)
        / len(answer.piece_s)
        for answer in answers
        if answer.complete and answer.piece_s
    )
    return tokens / until_s if until_s else 0.0


def targets(found: Static | None) -> Iterator[Target]:
    """Yield the targets of the section; `found` is None if it was not measured."""
    ttft = ratio = sustained = failed = None
    where = ""
    if found is not None:
        fast, slow = found.saturated_ours.token_rate, found.saturated_batches.token_rate
        ratio = slow / fast if fast else float("nan")
        failed, sustained = float(len(found.failed)), float(found.fraction is None)
        if found.ours is not None and found.batches is not None:
            where = f"at {found.rate:.2f} requests/s"
            ttft = _p99(found.ours) / _p99(found.batches)
    name = "static: p99 TTFT, continuous over batches at the highest rate that batches sustain"
    yield Target(name, TTFT_SHARE, ttft, where)
    name = "static: throughput at saturation, batches over continuous"
    yield Target(name, 1 / THROUGHPUT_RATIO, ratio)
    yield Target("static: batches sustain none of the rates", 0.0, sustained)
    yield Target("static: failed requests", 0.0, failed, _first(found.failed if found else []))


def _p99(figures: Figures) -> float:
    return figures.ttft.p99 if figures.ttft else float("nan")


def _first(failed: Sequence[str]) -> str:
    return failed[0] if failed else ""
