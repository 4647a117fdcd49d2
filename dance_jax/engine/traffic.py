"""Counters of the traffic over this server's links since its engine was warm."""

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

    #: int64 [l, n]: hidden states sent to each server.
    transfers: np.ndarray
    #: Hidden states sent between servers, as far as this server knows: by all servers if they step
    #: together, otherwise by this server only; and those over the busiest link direction of each
    #: layer and step.
    rows: int
    busiest_rows: int
    #: int64 [n] each: payload bytes sent to and received from each server.
    bytes_sent: np.ndarray
    bytes_received: np.ndarray
    #: Counters of calls and layers; and counters per server, empty if servers step together.
    sums: Sums = dataclasses.field(default_factory=Sums)
    peers: tuple[PeerCounters, ...] = ()


class LinkTraffic(Protocol):
    """Counts one server's traffic."""

    def add(self, crossed: Crossed) -> None:
        """Add the traffic of a step."""
        ...

    def totals(self) -> Totals:
        """The counters since the last `reset`."""
        ...

    def reset(self) -> None:
        """Restart all counters at 0."""
        ...

    def inside(self) -> Mapping[str, float]:
        """Seconds of the steps' parts, in the form that `StepClock` takes."""
        ...


class LockStepTraffic:
    """Traffic of servers that step together, each of which knows the traffic of all links.

    Args:
        rank: this server's rank.
        layers: number of MoE layers.
        servers: number of servers.
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
    """Traffic of a server that steps on its own and knows the calls it makes and answers."""

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
        # This server's rows cross links independently of the other servers' steps, so each of its
        # links counts as the busiest at that time.
        rows = int(found.rows.sum())
        return Totals(found.rows, rows, rows, sent_n, received_n, found.sums, found.peers)

    def inside(self) -> Mapping[str, float]:
        sums = self._calls.sums()
        return {"wait": sums.waited_s, "exchange": 0.0, "experts": sums.local_s}
