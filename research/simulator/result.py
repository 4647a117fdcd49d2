"""What a simulation finds, and how it is gathered."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from research.simulator.batches import Sequence
from research.simulator.scenario import Bucket, Scenario


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and percentiles of times, in seconds."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: np.ndarray) -> Spread:
        p50, p99 = np.percentile(seconds, [50, 99])
        return cls(float(seconds.mean()), float(p50), float(p99))


@dataclasses.dataclass
class Work:
    """What one server that steps on its own did in a period, simulated or measured.

    An engine counts the same numbers, so that both can be compared, and speeds fitted.
    """

    steps: int = 0
    #: Steps in each bucket.
    buckets: collections.Counter[Bucket] = dataclasses.field(default_factory=collections.Counter)
    #: Positions that its tokens attended to: each token's own and all before it.
    positions: int = 0
    #: Expert calls that its devices computed, for its own tokens and those of others.
    calls: int = 0
    #: Messages with calls that it sent or answered, and rows in them.
    messages: int = 0
    rows: int = 0
    #: Late calls that it repeated to other holders.
    repeats: int = 0
    #: Seconds of its steps except waiting for other servers; includes stops by a quota.
    computing_s: float = 0.0
    #: Processor seconds.
    processor_s: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What the requests waited for, and what they used."""

    #: float64 [requests], in the requests' order: seconds from arrival to the last token, and to
    #: the first token.
    latencies: np.ndarray
    ttfts: np.ndarray
    #: Simulated seconds, from 0 to the last token.
    seconds: float
    #: int64 [servers]: steps that each server did; in lock step all did the same.
    steps: np.ndarray
    #: int64 [servers, servers]: payload bytes from server to server.
    bytes_nn: np.ndarray
    #: int64 [layers]: hidden states sent between servers.
    rows: np.ndarray
    #: Per server, float64 [devices]: share of the time in which the device computes.
    device_utilisation: tuple[np.ndarray, ...]
    #: float64 [servers] each: share of the time in which the direction of the link is in use.
    out_utilisation: np.ndarray
    in_utilisation: np.ndarray
    #: float64 [servers] each: seconds of computation and of communication on the critical path of
    #: a server's steps; the path of a layer leads through what came last. Waiting for a device, and
    #: being stopped by a quota, is computation; waiting for a link is communication. Together they
    #: are all seconds of its steps. In lock step they are the same for all servers.
    compute_seconds: np.ndarray
    communicate_seconds: np.ndarray
    #: The work of each server; empty in lock step, where it is not counted.
    work: tuple[Work, ...] = ()

    @property
    def latency(self) -> Spread:
        return Spread.of(self.latencies)

    @property
    def ttft(self) -> Spread:
        return Spread.of(self.ttfts)

    @property
    def sent_bytes(self) -> np.ndarray:
        """int64 [servers]: payload out of each link."""
        return self.bytes_nn.sum(1)

    @property
    def received_bytes(self) -> np.ndarray:
        """int64 [servers]: payload into each link."""
        return self.bytes_nn.sum(0)

    @property
    def network(self) -> float:
        """The share of communication in the critical path."""
        whole = self.compute_seconds.sum() + self.communicate_seconds.sum()
        return float(self.communicate_seconds.sum() / whole) if whole else 0.0


class Book:
    """Gathers a `Result` during a simulation."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        num, requests = len(scenario.servers), scenario.requests
        self._first = np.full(len(requests), np.nan)
        self._done = np.full(len(requests), np.nan)
        self.steps = np.zeros(num, np.int64)
        self.bytes_nn = np.zeros((num, num), np.int64)
        self.rows = np.zeros(scenario.model.layers, np.int64)
        #: Seconds in use of all devices, server after server, and of each server's link.
        self.device_busy = np.zeros(sum(scenario.devices))
        self.out_busy, self.in_busy = np.zeros(num), np.zeros(num)
        #: As in `Result`.
        self.compute, self.communicate = np.zeros(num), np.zeros(num)
        self.work: tuple[Work, ...] = ()

    def tokens(self, sequences: list[Sequence], now: float) -> None:
        """Notes that these sequences got a token now."""
        for sequence in sequences:
            if sequence.sampled == 1:
                self._first[sequence.request] = now
            if sequence.sampled == sequence.output:
                self._done[sequence.request] = now

    def result(self) -> Result:
        """The result; raises RuntimeError if a request is not finished."""
        if np.isnan(self._done).any():
            raise RuntimeError(f"{np.isnan(self._done).sum()} requests were not finished")
        scenario, requests = self._scenario, self._scenario.requests
        besides = np.array([server.speed.request for server in scenario.servers])[requests.server]
        seconds = float(self._done.max())
        # `seconds` is 0 if nothing takes any time.
        share = 1 / seconds if seconds > 0 else 0.0
        return Result(
            latencies=self._done - requests.at + besides,
            ttfts=self._first - requests.at + besides,
            seconds=seconds,
            steps=self.steps,
            bytes_nn=self.bytes_nn,
            rows=self.rows,
            device_utilisation=tuple(
                np.split(self.device_busy * share, np.cumsum(scenario.devices)[:-1])
            ),
            out_utilisation=self.out_busy * share,
            in_utilisation=self.in_busy * share,
            compute_seconds=self.compute,
            communicate_seconds=self.communicate,
            work=self.work,
        )
