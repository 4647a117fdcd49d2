"""What a server counts of expert calls, without JAX: engines report it, `/metrics` shows it.

The one list of these counters: fields are in the order of `PeerCounters` and `CallSums` in
native/calls.h. A field with a text is a metric of its own (serve/metrics.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np

_Counted = TypeVar("_Counted")


def _metric(text: str) -> Any:
    """A counter that `/metrics` explains so."""
    return dataclasses.field(default=0, metadata={"metric": text})


@dataclasses.dataclass
class PeerCounters:
    """What a server has counted of a peer, since its engine was warm; times are in ns."""

    calls: int = _metric("Expert calls to the peer, repeats included")
    rows: int = _metric("Rows in these calls")
    #: Of calls to it and of answers to its own.
    bytes_sent: int = 0
    bytes_received: int = 0
    repeats: int = _metric("Calls that went to other servers too, as the peer's answer was late")
    refusals: int = _metric("Calls that the peer answered with: not here")
    lost: int = _metric("Calls that ended with the connection")
    failed_rows: int = _metric("Rows that failed for want of an expert that the peer holds")
    waited_ns: int = _metric("Time from sending calls to the arrival of answers")
    answered: int = _metric("The peer's calls answered here")
    answered_rows: int = _metric("Rows computed for the peer")
    queued_ns: int = _metric("Time that the peer's calls waited here until they were computed")


@dataclasses.dataclass(frozen=True)
class Moved:
    """Sums over calls that moved bytes, for the line of their seconds over their bytes."""

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
        """The calls since then."""
        return since(before, self)


NOTHING_MOVED = Moved()


@dataclasses.dataclass
class Sums:
    """What a server has counted of all calls and layers."""

    #: Layers of own steps, and seconds in them: experts that are here, and waiting for answers.
    layers: float = 0.0
    local_s: float = 0.0
    waited_s: float = 0.0
    #: Layers of own steps in which any row has calls that leave this server, and the number of
    #: these rows. Counted also if servers step together.
    layers_waited: float = 0.0
    rows_away: float = 0.0
    served_s: float = _metric("Time in which experts were computed for other servers")
    served_batches: float = _metric("Computations of experts for calls that waited together")
    #: Of answers, without what callees say they took.
    moved: Moved = NOTHING_MOVED


@dataclasses.dataclass(frozen=True)
class Counters:
    """Everything that a server has counted."""

    peers: tuple[PeerCounters, ...]
    #: int64 [l, n], rows that went to each server.
    rows: np.ndarray
    sums: Sums

    def __sub__(self, before: Counters) -> Counters:
        """What was counted since then."""
        peers = tuple(map(since, before.peers, self.peers))
        return Counters(peers, self.rows - before.rows, since(before.sums, self.sums))


def since(before: _Counted, now: _Counted) -> _Counted:
    """What each field of a dataclass of numbers has grown by."""
    names = [field.name for field in dataclasses.fields(now)]  # type: ignore[arg-type]
    return type(now)(*(getattr(now, name) - getattr(before, name) for name in names))
