"""Send requests to servers, sample the servers' metrics meanwhile, and move experts."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from dance_jax.bench.client import Answer, Api, Call
from dance_jax.bench.cluster import RunError
from dance_jax.bench.drive import Done, open_loop
from dance_jax.bench.http import request

PREFIX = "dance_jax:"
#: Parts of a step's time, as `engine.step_clock.StepClock` counts them.
PARTS = ("schedule", "compute", "experts", "wait", "exchange", "output")
#: Parts in which the engine computes, without transfers or waiting.
COMPUTING = ("schedule", "compute", "experts", "output")
#: Seconds between two samples; seconds within which a migration must be complete.
ASK_S, MOVE_S = 0.5, 300.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """Metrics of all servers at one moment.

    Lists have one value per server; counters count since the server started.
    """

    #: Seconds after the run's start.
    at_s: float
    #: Expert calls served by the server itself, and by other servers.
    local: list[float]
    remote: list[float]
    #: Bytes of payload sent to other servers.
    sent: list[float]
    #: Bytes sent through the hosts' interfaces; empty without a testbed.
    wire: list[float]
    #: Hidden states sent.
    transfers: list[float]
    #: (token, layer) pairs with at least one expert call on another server.
    away: list[float]
    #: Hidden states of all servers through the busiest link of each layer, summed over the layers.
    busiest: list[float]
    #: Prompt and generated tokens.
    tokens: list[float]
    steps: list[float]
    #: Steps of each server by bucket, as in `engine.report.EngineReport.bucket_steps`.
    bucket_steps: dict[str, list[float]]
    #: Positions that tokens attended to.
    positions: list[float]
    #: Expert calls that the server's devices computed.
    served: list[float]
    #: Messages with expert calls that the server sent or answered, and the rows in them.
    messages: list[float]
    rows: list[float]
    #: Expert calls that were late and were repeated to another server.
    repeats: list[float]
    #: Longest of the recent steps.
    longest_step_s: list[float]
    #: Seconds of each server's steps by part, as `engine.step_clock` names the parts.
    seconds: dict[str, list[float]]
    #: Processor seconds of each engine.
    cpu_s: list[float]
    #: Version of the placement, as the first server knows it.
    version: int
    #: Counted by the first server.
    migrations: int
    experts_migrated: int


@dataclasses.dataclass(frozen=True)
class Watched:
    """Results of a run under load.

    Attributes:
        answers: in the order of the calls.
        samples: in the order of time.
        decision: the last placement decision, as /placement reports it; None if there was none.
    """

    answers: list[Answer]
    samples: list[Sample]
    decision: dict[str, Any] | None

    @property
    def moves_s(self) -> list[float]:
        """Seconds of the first samples after each migration was complete."""
        return [
            later.at_s
            for before, later in itertools.pairwise(self.samples)
            if later.migrations > before.migrations
        ]

    def remote_share(self, since_s: float, until_s: float = math.inf) -> float:
        """Return the remote share of the expert calls counted in that time, mean of the servers."""
        remote, local = (
            self._spent("remote", since_s, until_s),
            self._spent("local", since_s, until_s),
        )
        return float(np.mean(remote / np.maximum(remote + local, 1)))

    def sent_per_call(self, since_s: float) -> list[float]:
        """Return the bytes that each server sent from `since_s` on, per expert call of all servers.

        Bytes are those through the server's interface, or of the payload without a testbed.
        """
        calls = self._spent("remote", since_s) + self._spent("local", since_s)
        sent = self._spent("wire" if self.samples[0].wire else "sent", since_s)
        return (sent / max(calls.sum(), 1)).tolist()

    def _spent(self, counter: str, since_s: float, until_s: float = math.inf) -> np.ndarray:
        """Return how much a counter of each server grew in that time."""
        within = [s for s in self.samples if since_s <= s.at_s <= until_s] or self.samples[-1:]
        return np.subtract(getattr(within[-1], counter), getattr(within[0], counter))


def _nothing() -> list[float]:
    return []


async def load(
    api: Api, calls: Sequence[Call], done: Done, wire: Callable[[], list[float]] = _nothing
) -> Watched:
    """Send the requests, and sample until the metrics include the last answers.

    Args:
        api: of the servers.
        calls: the requests, with their arrival times.
        done: called after each answer.
        wire: returns the bytes sent through each server's interface so far.
    """
    async with watched(api, wire) as samples:
        answers = await open_loop(api, calls, done)
        await asyncio.sleep(2 * ASK_S)
    return Watched(answers, samples, (await placement(api))["last_decision"])


@contextlib.asynccontextmanager
async def watched(
    api: Api, wire: Callable[[], list[float]] = _nothing, every_s: float = ASK_S
) -> AsyncIterator[list[Sample]]:
    """Sample all servers while the block runs; the first and last samples are of its two ends.

    Measured: reading one of three servers keeps this process busy for 20 ms.
    """
    origin, samples = time.perf_counter(), []

    async def watch() -> None:
        while True:
            samples.append(await sample(api, origin, wire))
            await asyncio.sleep(every_s)

    samples.append(await sample(api, origin, wire))
    task = asyncio.create_task(watch())
    try:
        yield samples
        samples.append(await sample(api, origin, wire))
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def sample(api: Api, origin: float, wire: Callable[[], list[float]] = _nothing) -> Sample:
    """Sample all servers now; `origin` is the time.perf_counter() of the run's start."""
    scraped = await asyncio.gather(*(_metrics(api, n) for n in range(len(api.addresses))))
    at_s = time.perf_counter() - origin

    def each(name: str, **labels: str) -> list[float]:
        return [
            sum(
                value
                for found, carried, value in metrics
                if found == PREFIX + name and labels.items() <= carried.items()
            )
            for metrics in scraped
        ]

    def both(one: str, other: str) -> list[float]:
        return [sum(pair) for pair in zip(each(one), each(other), strict=True)]

    buckets = sorted(
        {
            carried["bucket"]
            for metrics in scraped
            for _, carried, _ in metrics
            if "bucket" in carried
        }
    )
    return Sample(
        at_s=at_s,
        local=each("expert_calls_total", where="local"),
        remote=each("expert_calls_total", where="remote"),
        sent=each("link_bytes_total", direction="sent"),
        wire=await asyncio.to_thread(wire),
        transfers=each("transfers_total"),
        away=each("token_layers_away_total"),
        busiest=each("busiest_transfers_total"),
        tokens=both("prompt_tokens_total", "generation_tokens_total"),
        steps=each("steps_total"),
        bucket_steps={b: each("bucket_steps_total", bucket=b) for b in buckets},
        positions=each("attended_positions_total"),
        served=each("expert_calls_served_total"),
        messages=both("peer_calls_total", "peer_answered_total"),
        rows=both("peer_rows_total", "peer_answered_rows_total"),
        repeats=each("peer_repeats_total"),
        longest_step_s=each("longest_step_seconds"),
        seconds={part: each("step_seconds_total", part=part) for part in PARTS},
        cpu_s=each("engine_cpu_seconds_total"),
        version=int(each("placement_version")[0]),
        migrations=int(each("migrations_total")[0]),
        experts_migrated=int(each("experts_migrated_total")[0]),
    )


async def _metrics(api: Api, server: int) -> list[tuple[str, dict[str, str], float]]:
    text = await api.get(server, "/metrics")
    return [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    ]


async def placement(api: Api) -> dict[str, Any]:
    """Return the first server's answer to GET /placement."""
    return msgspec.json.decode(await api.get(0, "/placement"))


async def force(api: Api) -> None:
    """Have experts move to where the policy wants them, whatever it costs; wait until they have.

    Raises:
        RunError: the migration fails or does not finish in time.
    """
    version = (await placement(api))["version"]
    if (await _rebalance(api, {"force": True}))["migrate"]:
        await moved(api, version)


async def _rebalance(api: Api, body: dict[str, Any]) -> dict[str, Any]:
    content, path = msgspec.json.encode(body), "/placement/rebalance"
    async with request(api.addresses[0], "POST", path, content) as response:
        answer = await response.read()
        if response.status != 200:
            raise RunError(f"POST {path} returned {response.status}: {answer.decode()}")
        return msgspec.json.decode(answer)


async def put(
    api: Api, names: Sequence[str], resident: Sequence[Sequence[Sequence[int]]]
) -> dict[str, Any]:
    """Have experts move to a given placement, wait until they have, and return the decision.

    Args:
        api: of the servers.
        names: of the servers.
        resident: [server][layer], the experts that the server shall hold.

    Raises:
        RunError: the request or the migration fails, or the migration does not finish in time.
    """
    version = (await placement(api))["version"]
    servers = [{"name": n, "resident": r} for n, r in zip(names, resident, strict=True)]
    decision = await _rebalance(api, {"servers": servers})
    if decision["migrate"]:
        await moved(api, version)
    return decision


async def moved(api: Api, version: int) -> None:
    """Wait until the placement has a later version than `version`.

    Raises:
        RunError: the migration fails, or does not finish within MOVE_S.
    """
    try:
        async with asyncio.timeout(MOVE_S):
            while (now := await placement(api))["version"] <= version:
                # The failure appears a moment after the answer that started the migration.
                if (last := now["last_decision"]) is not None and last["failure"]:
                    raise RunError(f"the migration failed: {last['failure']}")
                await asyncio.sleep(ASK_S)
    except TimeoutError:
        raise RunError(f"the migration is not complete after {MOVE_S:g} s") from None
