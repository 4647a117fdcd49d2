"""What has crossed the links of this server since its engine was warm, and how long that took."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from dance_jax.engine.step import Crossed
from dance_jax.models import kernels_cpu
from dance_jax.models.calls import ExpertCalls
from dance_jax.models.counters import PeerCounters, Sums


@dataclasses.dataclass(frozen=True)
class Totals:
    """Counters of one server; n servers, l MoE layers."""

    #: int64 [l, n], hidden states sent to each server.
    transfers: np.ndarray
    #: Hidden states that this server knows of: of all servers where they step together, else its
    #: own; and those through the busiest link direction of each layer and step.
    rows: int
    busiest_rows: int
    #: int64 [n], payload bytes to and from each server.
    bytes_sent: np.ndarray
    bytes_received: np.ndarray
    #: Sums over calls and layers; counters of each server, empty if servers step together.
    sums: Sums = dataclasses.field(default_factory=Sums)
    peers: tuple[PeerCounters, ...] = ()


class LinkTraffic(Protocol):
    """Counts one server's traffic."""

    def add(self, crossed: Crossed) -> None:
        """A step has ended."""
        ...

    def totals(self) -> Totals:
        """Since the last `reset`."""
        ...

    def reset(self) -> None:
        """Counts from here on."""
        ...

    def inside(self) -> Mapping[str, float]:
        """Seconds of the steps' parts, as `StepClock` wants them."""
        ...


class LockStepTraffic:
    """Of servers that step together, which all know what crosses all links.

    Args:
        rank: this server's.
        layers, servers: of the model, of the cluster.
    """

    def __init__(self, rank: int, layers: int, servers: int) -> None:
        self._rank, self._shape = rank, (layers, servers)
        self.reset()

    def reset(self) -> None:
        layers, servers = self._shape
        self._transfers = np.zeros((layers, servers), np.int64)
        self._rows = self._busiest_rows = self._layers_waited = self._rows_away = 0
        self._bytes = np.zeros((servers, servers), np.int64)

    def add(self, crossed: Crossed) -> None:
        self._transfers += crossed.rows[:, self._rank]
        self._rows += int(crossed.rows.sum())
        ways_ln = np.maximum(crossed.rows.sum(1), crossed.rows.sum(2))
        self._busiest_rows += int(ways_ln.max(1).sum())
        self._layers_waited += int((crossed.away > 0).sum())
        self._rows_away += int(crossed.away.sum())
        self._bytes += crossed.bytes.sum(0)

    def totals(self) -> Totals:
        sent, received = self._bytes[self._rank], self._bytes[:, self._rank]
        rows = self._rows, self._busiest_rows
        sums = Sums(layers_waited=self._layers_waited, rows_away=self._rows_away)
        return Totals(self._transfers.copy(), *rows, sent.copy(), received.copy(), sums)

    def inside(self) -> Mapping[str, float]:
        return {"wait": 0.0, "exchange": 0.0, "experts": kernels_cpu.routed_seconds()[1]}


class CallTraffic:
    """Of a server that steps on its own, which knows of its own calls and of those it answers."""

    def __init__(self, calls: ExpertCalls) -> None:
        self._calls = calls
        self.reset()

    def reset(self) -> None:
        self._before = self._calls.counters()

    def add(self, crossed: Crossed) -> None:
        pass

    def totals(self) -> Totals:
        found = self._calls.counters() - self._before
        sent_n = np.array([peer.bytes_sent for peer in found.peers], np.int64)
        received_n = np.array([peer.bytes_received for peer in found.peers], np.int64)
        # Its rows cross links while those of others do not: each link is the busiest of its time.
        rows = int(found.rows.sum())
        return Totals(found.rows, rows, rows, sent_n, received_n, found.sums, found.peers)

    def inside(self) -> Mapping[str, float]:
        sums = self._calls.sums()
        return {"wait": sums.waited_s, "exchange": 0.0, "experts": sums.local_s}
