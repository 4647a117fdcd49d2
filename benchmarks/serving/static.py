"""Continuous batching against a batch at a time, on the same servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from benchmarks.targets import Target

from . import arrivals
from .arrivals import Arrival
from .client import Answer, Call
from .drive import Batch, gated, open_loop
from .figures import Figures, first_token_s, saturated_until, token_rate
from .setting import Setting, failures

#: Full batches of each server at saturation.
TURNS = 4
#: Rates that are tried, of what batches reach at saturation, in requests.
FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
#: Tokens: of the longest answer; of prompts, at least and at most.
LONGEST, PROMPTS = 256, (32, 256)
#: p99 TTFT and throughput: at most so much of the static batch's, at least so many times it.
TTFT_SHARE, THROUGHPUT_RATIO = 1 / 3, 2.0


@dataclasses.dataclass(frozen=True)
class Saturated:
    """While requests wait on every server."""

    #: Output tokens per second.
    token_rate: float
    #: Seconds that it was so.
    seconds: float


@dataclasses.dataclass(frozen=True)
class Static:
    """What was found; `batches` are a batch at a time, `ours` is continuous."""

    saturated_batches: Saturated
    saturated_ours: Saturated
    #: Requests per second of all servers that batches reach at saturation.
    capacity: float
    #: Of it, the highest that was sustained; None: none was.
    fraction: float | None
    #: At that rate.
    batches: Figures | None
    ours: Figures | None
    #: TTFT of every request, seconds.
    ttft_batches: list[float]
    ttft_ours: list[float]
    failed: list[str]

    @property
    def rate(self) -> float | None:
        """Requests per second of all servers."""
        return None if self.fraction is None else self.fraction * self.capacity


async def measure(setting: Setting, window_s: float) -> Static:
    """
    Args:
        window_s: seconds in which requests arrive, of one rate.
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
    """The first batch after the window took all that waited: no queue has grown in it."""
    return next((batch.left == 0 for batch in batches if batch.start_s >= window_s), True)


def _arrivals(setting: Setting, rate: float, window_s: float) -> list[Arrival]:
    """`rate` is of all servers; each has its part by what it can run at once."""
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
    """Of the same lengths in every run, with texts of its own: caches know nothing of them."""
    lengths, words = setting.rng("static: lengths"), setting.rng(run)
    outputs = arrivals.answer_lengths(len(coming), LONGEST, lengths)
    prompts = lengths.integers(*PROMPTS, len(coming), endpoint=True).tolist()
    return [
        Call(each.server, setting.texts.cut(each.server, prompt, words), output, each.at_s)
        for each, prompt, output in zip(coming, prompts, outputs, strict=True)
    ]


def targets(found: Static | None) -> Iterator[Target]:
    """What has to be reached; None: not measured."""
    ttft = ratio = sustained = failed = None
    where = ""
    if found is not None:
        fast, slow = found.saturated_ours.token_rate, found.saturated_batches.token_rate
        ratio = slow / fast if fast else float("nan")
        failed, sustained = float(len(found.failed)), float(found.fraction is None)
        if found.ours is not None and found.batches is not None:
            where = f"at {found.rate:.2f} requests/s"
            ttft = _p99(found.ours) / _p99(found.batches)
    name = "static: p99 TTFT, of a batch at a time's at the highest rate that sustains"
    yield Target(name, TTFT_SHARE, ttft, where)
    name = "static: a batch at a time's throughput at saturation, of ours"
    yield Target(name, 1 / THROUGHPUT_RATIO, ratio)
    yield Target("static: a batch at a time sustains none of the rates", 0.0, sustained)
    yield Target("static: failed requests", 0.0, failed, _first(found.failed if found else []))


def _p99(figures: Figures) -> float:
    return figures.ttft.p99 if figures.ttft else float("nan")


def _first(failed: Sequence[str]) -> str:
    return failed[0] if failed else ""
