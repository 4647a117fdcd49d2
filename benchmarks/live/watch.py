"""What servers tell while they are asked."""

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

from benchmarks.serving.client import Answer, Api, Call
from benchmarks.serving.cluster import ClusterError
from benchmarks.serving.drive import Done, open_loop
from benchmarks.serving.http import request

PREFIX = "dance_jax:"
#: Of a step's time, as `engine.step_clock.StepClock` counts it.
PARTS = ("schedule", "compute", "experts", "wait", "exchange", "output")
#: The parts in which nothing is sent or waited for.
COMPUTING = ("schedule", "compute", "experts", "output")
#: Seconds between two questions; for a migration.
ASK_S, MOVE_S = 0.5, 300.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """All servers at one moment; counters since they started."""

    #: Seconds after the run's start.
    at_s: float
    #: By server: expert calls by where they were served; payload sent; steps; longest of late.
    local: list[float]
    remote: list[float]
    sent: list[float]
    #: The same through the hosts' interfaces; empty where there are none.
    wire: list[float]
    #: Hidden states sent; pairs of token and layer with any call elsewhere; hidden states of all
    #: servers through the busiest link of each layer; tokens.
    transfers: list[float]
    away: list[float]
    busiest: list[float]
    tokens: list[float]
    steps: list[float]
    #: By bucket, as in `engine.report.EngineReport.bucket_steps`, and server.
    bucket_steps: dict[str, list[float]]
    #: Positions that tokens attended to.
    positions: list[float]
    #: Expert calls that its devices computed; messages with calls that it sent or answered; rows in
    #: them; late calls that it repeated to other holders.
    served: list[float]
    messages: list[float]
    rows: list[float]
    repeats: list[float]
    longest_step_s: list[float]
    #: By part of the steps, as `engine.step_clock` names them, and server.
    seconds: dict[str, list[float]]
    #: Processor seconds of each engine.
    cpu_s: list[float]
    #: As the first server knows it.
    version: int
    migrations: int
    experts_migrated: int


@dataclasses.dataclass(frozen=True)
class Watched:
    """A run under load.

    Attributes:
        answers: in the order of the calls.
        samples: in their order.
        decision: the last one, as /placement tells it; None: there was none.
    """

    answers: list[Answer]
    samples: list[Sample]
    decision: dict[str, Any] | None

    @property
    def moves_s(self) -> list[float]:
        """When migrations were seen to be complete."""
        return [
            later.at_s
            for before, later in itertools.pairwise(self.samples)
            if later.migrations > before.migrations
        ]

    def remote_share(self, since_s: float, until_s: float = math.inf) -> float:
        """Of the expert calls counted in that time, the mean of the servers."""
        remote, local = (
            self._spent("remote", since_s, until_s),
            self._spent("local", since_s, until_s),
        )
        return float(np.mean(remote / np.maximum(remote + local, 1)))

    def sent_per_call(self, since_s: float) -> list[float]:
        """Bytes that each server sent from then on, per expert call of all users: through its
        interface, or the payload where there is none."""
        calls = self._spent("remote", since_s) + self._spent("local", since_s)
        sent = self._spent("wire" if self.samples[0].wire else "sent", since_s)
        return (sent / max(calls.sum(), 1)).tolist()

    def _spent(self, counter: str, since_s: float, until_s: float = math.inf) -> np.ndarray:
        """What a counter of each server grew by."""
        within = [s for s in self.samples if since_s <= s.at_s <= until_s] or self.samples[-1:]
        return np.subtract(getattr(within[-1], counter), getattr(within[0], counter))


def _nothing() -> list[float]:
    return []


async def load(
    api: Api, calls: Sequence[Call], done: Done, wire: Callable[[], list[float]] = _nothing
) -> Watched:
    """Asks, and watches meanwhile and until the counters of the last answers have come.

    Args:
        wire: bytes sent through each server's interface so far.
    """
    async with watched(api, wire) as samples:
        answers = await open_loop(api, calls, done)
        await asyncio.sleep(2 * ASK_S)
    return Watched(answers, samples, (await placement(api))["last_decision"])


@contextlib.asynccontextmanager
async def watched(
    api: Api, wire: Callable[[], list[float]] = _nothing, every_s: float = ASK_S
) -> AsyncIterator[list[Sample]]:
    """Samples that come while the block runs; the first and the last are of its ends.

    (measured) Reading one of three servers keeps this process busy for 20 ms.
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
    """All servers now; `origin` of time.perf_counter."""
    told = await asyncio.gather(*(_metrics(api, n) for n in range(len(api.addresses))))
    at_s = time.perf_counter() - origin

    def each(name: str, **labels: str) -> list[float]:
        return [
            sum(
                value
                for found, carried, value in metrics
                if found == PREFIX + name and labels.items() <= carried.items()
            )
            for metrics in told
        ]

    def both(one: str, other: str) -> list[float]:
        return [sum(pair) for pair in zip(each(one), each(other), strict=True)]

    buckets = sorted(
        {carried["bucket"] for metrics in told for _, carried, _ in metrics if "bucket" in carried}
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
    """What /placement says."""
    return msgspec.json.decode(await api.get(0, "/placement"))


async def force(api: Api) -> None:
    """Experts move to where the policy wants them now, whatever it costs.

    Raises:
        ClusterError: they do not arrive.
    """
    version = (await placement(api))["version"]
    if (await _rebalance(api, {"force": True}))["migrate"]:
        await moved(api, version)


async def _rebalance(api: Api, body: dict[str, Any]) -> dict[str, Any]:
    content, path = msgspec.json.encode(body), "/placement/rebalance"
    async with request(api.addresses[0], "POST", path, content) as response:
        answer = await response.read()
        if response.status != 200:
            raise ClusterError(f"{path} answers {response.status}: {answer.decode()}")
        return msgspec.json.decode(answer)


async def put(
    api: Api, names: Sequence[str], resident: Sequence[Sequence[Sequence[int]]]
) -> dict[str, Any]:
    """Experts are to move there; returns the decision when they have.

    Args:
        names: of the servers.
        resident: [server][layer], experts that each holds.

    Raises:
        ClusterError: they do not.
    """
    version = (await placement(api))["version"]
    servers = [{"name": n, "resident": r} for n, r in zip(names, resident, strict=True)]
    decision = await _rebalance(api, {"servers": servers})
    if decision["migrate"]:
        await moved(api, version)
    return decision


async def moved(api: Api, version: int) -> None:
    """Returns when the placement is a later one than this.

    Raises:
        ClusterError: experts stopped moving, or do not arrive.
    """
    try:
        async with asyncio.timeout(MOVE_S):
            while (now := await placement(api))["version"] <= version:
                # Told a moment after its answer.
                if (last := now["last_decision"]) is not None and last["failure"]:
                    raise ClusterError(f"experts stopped moving: {last['failure']}")
                await asyncio.sleep(ASK_S)
    except TimeoutError:
        raise ClusterError(f"experts have not moved after {MOVE_S:g} s") from None
