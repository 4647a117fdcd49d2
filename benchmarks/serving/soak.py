"""Section `soak`: many requests at saturation, some invalid, some whose users disconnect."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

from benchmarks.targets import Target
from dance_jax.bench.client import Answer, Call
from dance_jax.bench.figures import Figures
from dance_jax.bench.http import HttpError

from . import memory
from .agreement import Difference, first_difference
from .gates import bounded
from .setting import Setting
from .wrong import refused, wrong_bodies

#: Minimum and maximum tokens of prompts, and of answers.
PROMPTS, ANSWERS = (4, 600), (1, 128)
#: Share of all requests whose users disconnect, and share of invalid requests.
HANG_UPS, WRONG = 0.05, 0.05
#: Requests in flight, as a multiple of those that a server runs at once.
PRESSURE = 2
#: Targets: largest margin at a first difference; unevenness of memory after the first quarter.
MARGIN, GROWTH = 1e-3, 0.05
#: Metrics that must be 0 on idle servers; their prefix; seconds within which they must be 0, and
#: between two checks.
IDLE_METRICS = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
PREFIX, IDLE_S, ASK_S = "dance_jax:", 15.0, 0.25


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome of one request of the soak; exactly one field is not None."""

    #: Answer to a valid request.
    answer: Answer | None = None
    #: For an invalid request, what was wrong with it, and what the server did instead of refusing
    #: it ("" if the server refused it).
    wrong: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Soak:
    """Results of the section."""

    requests: int
    #: Requests whose users disconnected.
    hung_up: int
    #: Number of invalid requests by what was wrong.
    wrong: dict[str, int]
    #: Reasons of valid requests that did not finish.
    failed: list[str]
    #: Outcomes of invalid requests that were not refused.
    taken: list[str]
    #: Number of answers compared with those of the quiet run.
    compared: int
    #: Differences between answers of this run and of the quiet run.
    differences: list[Difference]
    samples: list[memory.Sample]
    #: Largest over smallest resident memory, minus 1, after the first quarter; None if unknown.
    growth: float | None
    #: Metrics that were not 0 at the end on idle servers.
    left_over: list[str]
    #: Figures of the valid requests.
    figures: Figures


async def measure(setting: Setting, requests: int) -> Soak:
    """Run the same requests quietly and at saturation, and compare.

    Args:
        setting: the servers and texts.
        requests: total number of requests at saturation.
    """
    setting.need(PROMPTS[1] + ANSWERS[1], "soak")
    calls = _calls(setting, requests)
    quiet = await _quiet(setting, calls)
    outcomes, samples = await _loud(setting, calls)
    answers = [each.answer for each in outcomes if each.answer is not None]
    whole = [answer for answer in answers if answer.call.hang_up_after is None]
    wrong = [each.wrong for each in outcomes if each.wrong is not None]
    pairs = [(a, b) for a, b in zip(quiet, whole, strict=True) if a.complete and b.complete]
    return Soak(
        requests=requests,
        hung_up=sum(answer.hung_up for answer in answers),
        wrong=dict(collections.Counter(name for name, _ in wrong)),
        failed=[why for answer in [*quiet, *answers] if (why := shortfall(answer))],
        taken=[f"{name}: {why}" for name, why in wrong if why],
        compared=len(pairs),
        differences=differences(pairs),
        samples=samples,
        growth=memory.unevenness(samples, requests),
        left_over=await _left_over(setting),
        figures=Figures.of("soak", whole),
    )


async def _quiet(setting: Setting, calls: Sequence[Call | None]) -> list[Answer]:
    """Answer valid requests whose users wait for the end, one at a time on each server."""
    good = [call for call in calls if call is not None and call.hang_up_after is None]
    with setting.progress("soak: quiet", len(good)) as done:
        origin = time.perf_counter()
        jobs = [(call.server, _job(setting, call, origin)) for call in good]
        found = await bounded(jobs, [1] * len(setting.names), done)
    return [each.answer for each in found if each.answer is not None]


async def _loud(
    setting: Setting, calls: Sequence[Call | None]
) -> tuple[list[Outcome], list[memory.Sample]]:
    """Send all requests at saturation, and sample the memory meanwhile."""
    finished = 0
    with setting.progress("soak", len(calls)) as advance:

        def done() -> None:
            nonlocal finished
            finished += 1
            advance()

        async with memory.watched(setting.pid, lambda: finished) as samples:
            in_flight = [PRESSURE * rows for rows in setting.rows]
            outcomes = await bounded(_all_jobs(setting, calls), in_flight, done)
    return outcomes, samples


def _calls(setting: Setting, requests: int) -> list[Call | None]:
    """Make the requests; None stands for an invalid one. Greedy, so that answers are comparable."""
    rng = setting.rng("soak")
    kinds = rng.permutation(requests) / requests
    found: list[Call | None] = []
    for n in range(requests):
        if kinds[n] < WRONG:
            found.append(None)
            continue
        server = n % len(setting.names)
        prompt = setting.texts.cut(server, int(rng.integers(*PROMPTS, endpoint=True)), rng)
        output = int(rng.integers(*ANSWERS, endpoint=True))
        hang_up = None
        if kinds[n] < WRONG + HANG_UPS:
            # In the middle of the answer, so that the server still has tokens to send.
            output = max(output, 8)
            hang_up = int(rng.integers(1, output // 2, endpoint=True))
        found.append(Call(server, prompt, output, logprobs=2, hang_up_after=hang_up))
    return found


def _all_jobs(
    setting: Setting, calls: Sequence[Call | None]
) -> list[tuple[int, Callable[[], Awaitable[Outcome]]]]:
    bodies = itertools.cycle(wrong_bodies(setting.api.model, setting.context).items())
    origin = time.perf_counter()
    jobs: list[tuple[int, Callable[[], Awaitable[Outcome]]]] = []
    for n, call in enumerate(calls):
        if call is None:
            server, (name, body) = n % len(setting.names), next(bodies)
            jobs.append((server, functools.partial(_ask_wrongly, setting, server, name, body)))
        else:
            jobs.append((call.server, _job(setting, call, origin)))
    return jobs


def _job(setting: Setting, call: Call, origin: float) -> Callable[[], Awaitable[Outcome]]:
    async def ask() -> Outcome:
        return Outcome(await setting.api.answer(call, origin, time.perf_counter() - origin))

    return ask


async def _ask_wrongly(setting: Setting, server: int, name: str, body: bytes) -> Outcome:
    try:
        status, answer = await setting.api.post(server, body)
    except HttpError as error:
        return Outcome(wrong=(name, str(error)))
    why = "" if refused(status) else f"HTTP {status}: {answer[:200].decode(errors='replace')}"
    return Outcome(wrong=(name, why))


def shortfall(answer: Answer) -> str | None:
    """Return why an answer is not as requested; None if it is, or if its user disconnected."""
    if answer.error is not None or answer.hung_up:
        return answer.error
    wanted = answer.call.max_tokens
    if answer.output_tokens != wanted or len(answer.tokens) != wanted:
        return f"{answer.output_tokens} tokens ({len(answer.tokens)} streamed) instead of {wanted}"
    return None if answer.finish_reason == "length" else f"ended with {answer.finish_reason}"


def differences(pairs: Iterable[tuple[Answer, Answer]]) -> list[Difference]:
    """Return the first differences between pairs of complete answers to the same calls."""
    found = (first_difference(ours.tokens, theirs.tokens) for ours, theirs in pairs)
    return [difference for difference in found if difference is not None]


async def _left_over(setting: Setting) -> list[str]:
    """Return metrics of idle servers that are not 0 within IDLE_S."""
    deadline = time.perf_counter() + IDLE_S
    while True:
        found = []
        for server, name in enumerate(setting.names):
            metrics = await setting.api.metrics(server)
            values = {key: metrics.get(PREFIX + key) for key in IDLE_METRICS}
            found += [f"{name}: {key} {value}" for key, value in values.items() if value != 0]
        if not found or time.perf_counter() > deadline:
            return found
        await asyncio.sleep(ASK_S)


def targets(found: Soak | None) -> Iterator[Target]:
    """Yield the targets of the section; `found` is None if it was not measured."""
    yield _none_of("soak: valid requests that did not finish", found and found.failed)
    yield _none_of("soak: invalid requests that were not refused", found and found.taken)
    widest = None
    where = ""
    if found is not None:
        widest = max((each.margin for each in found.differences), default=0.0)
        where = f"{len(found.differences)} of {found.compared} answers differ from the quiet run"
    yield Target("soak: margin at a first difference", MARGIN, widest, where)
    growth = None if found is None else found.growth
    yield Target("soak: unevenness of resident memory after the first quarter", GROWTH, growth)
    yield _none_of("soak: metrics of idle servers that are not 0", found and found.left_over)


def _none_of(name: str, found: list[str] | None) -> Target:
    count = None if found is None else float(len(found))
    return Target(name, 0.0, count, found[0] if found else "")
