"""What a simulation finds, and how it is gathered."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from research.simulator.batches import Sequence
from research.simulator.scenario import Bucket, Scenario


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of a time in seconds."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: np.ndarray) -> Spread:
        p50, p99 = np.percentile(seconds, [50, 99])
        return cls(float(seconds.mean()), float(p50), float(p99))


@dataclasses.dataclass
class Work:
    """What one server that steps on its own did in some time, simulated or measured.

    Numbers are those that an engine counts too, so that both can be compared, and speeds fitted.
    """

    steps: int = 0
    #: Steps in each bucket.
    buckets: collections.Counter[Bucket] = dataclasses.field(default_factory=collections.Counter)
    #: Positions that its tokens attended to, each its own and all before it.
    positions: int = 0
    #: Expert calls on its devices, for its own tokens and others'.
    calls: int = 0
    #: Messages with calls that it sent, and those that it answered; rows in them.
    messages: int = 0
    rows: int = 0
    #: Calls that were late, and went to others too.
    repeats: int = 0
    #: Seconds of its steps but for those in which it waits for others; where a quota stops it, with
    #: those in which it does.
    computing_s: float = 0.0
    #: Processor seconds.
    processor_s: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What the requests waited for, and what they used."""

    #: float64 [requests], in the requests' order: seconds from arrival to the last token, and to
    #: the first.
    latencies: np.ndarray
    ttfts: np.ndarray
    #: int64 [servers]: where requests arrived, for means of each server.
    requests_of: np.ndarray
    #: Simulated seconds, from 0 to the last token.
    seconds: float
    #: int64 [servers]: steps that each did; all the same in lock step.
    steps: np.ndarray
    #: int64 [servers, servers]: payload bytes from server to server.
    bytes_nn: np.ndarray
    #: int64 [layers]: hidden states between servers.
    rows: np.ndarray
    #: Per server, float64 [devices]: share of the time in which the device computes.
    device_utilisation: tuple[np.ndarray, ...]
    #: float64 [servers] each: share of the time in which the direction of the link is in use.
    out_utilisation: np.ndarray
    in_utilisation: np.ndarray
    #: float64 [servers] each: seconds of computation and of communication on the critical path of
    #: a server's steps: every layer's ends with what came last. Waiting for a device counts as
    #: the one, for a link as the other; being stopped by a quota is computation. Together they are
    #: all its steps; in lock step all servers have the same.
    compute_seconds: np.ndarray
    communicate_seconds: np.ndarray
    #: Of each server; (): in lock step, where it is not counted.
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
    def utilisation(self) -> float:
        """Of the busiest device."""
        return float(max(each.max() for each in self.device_utilisation))

    @property
    def network(self) -> float:
        """Share of communication on the critical path."""
        whole = self.compute_seconds.sum() + self.communicate_seconds.sum()
        return float(self.communicate_seconds.sum() / whole) if whole else 0.0


class Book:
    """Gathers a `Result` while events happen."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        num, requests = len(scenario.servers), scenario.requests
        self._first = np.full(len(requests), np.nan)
        self._done = np.full(len(requests), np.nan)
        self.steps = np.zeros(num, np.int64)
        self.bytes_nn = np.zeros((num, num), np.int64)
        self.rows = np.zeros(scenario.model.layers, np.int64)
        #: Seconds in use: of all devices, server after server, and of each server's link.
        self.device_busy = np.zeros(sum(scenario.devices))
        self.out_busy, self.in_busy = np.zeros(num), np.zeros(num)
        #: As in `Result`.
        self.compute, self.communicate = np.zeros(num), np.zeros(num)
        self.work: tuple[Work, ...] = ()

    def tokens(self, sequences: list[Sequence], now: float) -> None:
        """These got a token now."""
        for sequence in sequences:
            if sequence.sampled == 1:
                self._first[sequence.request] = now
            if sequence.sampled == sequence.output:
                self._done[sequence.request] = now

    def result(self) -> Result:
        """Raises RuntimeError unless all requests are done."""
        if np.isnan(self._done).any():
            raise RuntimeError(f"{np.isnan(self._done).sum()} requests were not finished")
        scenario, requests = self._scenario, self._scenario.requests
        besides = np.array([server.speed.request for server in scenario.servers])[requests.server]
        seconds = float(self._done.max())
        # A request that costs nothing leaves no time to be busy in.
        share = 1 / seconds if seconds > 0 else 0.0
        return Result(
            latencies=self._done - requests.at + besides,
            ttfts=self._first - requests.at + besides,
            requests_of=requests.server,
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
