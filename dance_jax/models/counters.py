"""Counters of expert calls, without JAX: engines report them and `/metrics` shows them.

`PeerCounters` and `CallSums` in native/calls.h have the same fields in the same order, and arrays
without names carry them from there: change both together. A field with a text is also a metric
(serve/metrics.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np

_Counted = TypeVar("_Counted")


def _metric(text: str) -> Any:
    """A counter field that is a metric with this help text."""
    return dataclasses.field(default=0, metadata={"metric": text})


@dataclasses.dataclass
class PeerCounters:
    """A server's counters for one peer since the engine's warmup; times are in ns."""

    calls: int = _metric("Expert calls to the peer, including repeats")
    rows: int = _metric("Rows in expert calls to the peer")
    #: Bytes of calls to the peer and of answers to the peer's calls.
    bytes_sent: int = 0
    #: Bytes of the peer's calls and of the peer's answers.
    bytes_received: int = 0
    repeats: int = _metric("Calls repeated at other servers because the peer's answer was late")
    refusals: int = _metric("Calls for which the peer did not hold all requested experts")
    lost: int = _metric("Calls lost because the connection to the peer ended")
    failed_rows: int = _metric("Rows that failed because an expert held by the peer was missing")
    waited_ns: int = _metric("Time from sending a call to receiving its answer")
    answered: int = _metric("Expert calls from the peer that this server answered")
    answered_rows: int = _metric("Rows computed for the peer")
    queued_ns: int = _metric("Time that calls from the peer waited until they were computed")


@dataclasses.dataclass(frozen=True)
class Moved:
    """Sums over answered calls, for a linear regression of seconds over bytes.

    `bytes_bytes` is the sum of bytes * bytes, and so on.
    """

    calls: float = 0.0
    seconds: float = 0.0
    bytes: float = 0.0
    bytes_bytes: float = 0.0
    bytes_seconds: float = 0.0
    seconds_seconds: float = 0.0

    def __add__(self, more: Moved) -> Moved:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(more), strict=True)
        return Moved(*map(sum, pairs))

    def __sub__(self, before: Moved) -> Moved:
        """Sums over the calls after `before`."""
        return since(before, self)


NOTHING_MOVED = Moved()


@dataclasses.dataclass
class Sums:
    """A server's counters over all calls and layers."""

    #: Layers of the server's own steps; seconds in which local experts were computed; seconds of
    #: waiting for answers.
    layers: float = 0.0
    local_s: float = 0.0
    waited_s: float = 0.0
    #: Layers of the server's own steps with rows that need another server, counted once per step;
    #: and the number of such rows. Servers that step together count these too.
    layers_waited: float = 0.0
    rows_away: float = 0.0
    served_s: float = _metric("Time spent computing experts for other servers")
    served_batches: float = _metric("Batches of calls from other servers, each computed at once")
    #: Sums over answers; the seconds do not include the callees' queueing and computation.
    moved: Moved = NOTHING_MOVED


@dataclasses.dataclass(frozen=True)
class Counters:
    """All counters of a server."""

    peers: tuple[PeerCounters, ...]
    #: int64 [l, n], rows sent to each server.
    rows: np.ndarray
    sums: Sums

    def __sub__(self, before: Counters) -> Counters:
        """The counts after `before`."""
        peers = tuple(map(since, before.peers, self.peers))
        return Counters(peers, self.rows - before.rows, since(before.sums, self.sums))


def since(before: _Counted, now: _Counted) -> _Counted:
    """Differences of all fields of a dataclass of numbers."""
    names = [field.name for field in dataclasses.fields(now)]  # type: ignore[arg-type]
    return type(now)(*(getattr(now, name) - getattr(before, name) for name in names))
