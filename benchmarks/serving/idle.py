"""Section `idle`: processor use of idle servers, and how soon they start a request."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator

import psutil

from benchmarks.targets import Target
from dance_jax.bench.client import Call
from dance_jax.bench.figures import Spread, failures

from .setting import Setting

#: Seconds of observation; tokens of a prompt; requests per server; seconds of rest before each
#: request, which are not a multiple of the heartbeat.
WATCHED_S, PROMPT, REPEATS, REST_S = 10.0, 16, 10, 0.37
#: Targets: cores used by an idle server; seconds from a request's arrival to its first step.
CORES, BEGIN_S = 0.05, 0.020
#: The metric that sums the time from arrival to first step over all requests.
QUEUE_TIME = "dance_jax:request_queue_time_seconds_sum"


@dataclasses.dataclass(frozen=True)
class Idle:
    """Results of the section."""

    #: Cores that each server's processes (front end and engine) use, in no order; None if unknown.
    cores: list[float] | None
    #: Seconds from arrival to the first step, of requests to an idle cluster.
    begin: Spread | None
    #: Seconds to the first token of these requests.
    ttft: Spread | None
    #: Reasons of failed requests.
    failed: list[str]


async def measure(setting: Setting) -> Idle:
    cores = None if setting.pid is None else await _cores(setting.pid)
    waited, ttft, failed = [], [], []
    rng = setting.rng("idle")
    origin = time.perf_counter()
    with setting.progress("idle", len(setting.names) * REPEATS) as done:
        for _ in range(REPEATS):
            for server in setting.servers:
                await asyncio.sleep(REST_S)
                before = (await setting.api.metrics(server))[QUEUE_TIME]
                call = Call(server, setting.texts.cut(server, PROMPT, rng), 1)
                answer = await setting.api.answer(call, origin, time.perf_counter() - origin)
                failed += failures([answer])
                waited.append((await setting.api.metrics(server))[QUEUE_TIME] - before)
                ttft += [answer.piece_s[0] - answer.due_s] if answer.piece_s else []
                done()
    return Idle(cores, Spread.of(waited), Spread.of(ttft), failed)


async def _cores(launcher: int) -> list[float]:
    """Measure the cores used by each child process of the launcher and its descendants."""
    servers = psutil.Process(launcher).children()
    trees = [[server, *server.children(recursive=True)] for server in servers]

    def seconds() -> list[float]:
        return [sum(sum(p.cpu_times()[:2]) for p in tree) for tree in trees]

    before = seconds()
    await asyncio.sleep(WATCHED_S)
    return [(late - early) / WATCHED_S for early, late in zip(before, seconds(), strict=True)]


def targets(found: Idle | None) -> Iterator[Target]:
    """Yield the targets of the section; `found` is None if it was not measured."""
    cores = None if found is None or found.cores is None else max(found.cores)
    yield Target("idle: cores used by an idle server", CORES, cores)
    begin = None if found is None or found.begin is None else found.begin.p99
    yield Target("idle: seconds to a request's first step, p99", BEGIN_S, begin)
    failed = found.failed if found else []
    count = None if found is None else float(len(failed))
    yield Target("idle: failed requests", 0.0, count, failed[0] if failed else "")
