"""State shared by a server's callers and answerer on the host: tables, counters and a trace."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from dance_jax.models.call_messages import Wire
from dance_jax.models.calls import FAIL_S, REPEAT_S, TRACE_EVENTS, TraceEvent, check_named
from dance_jax.models.counters import Counters, Moved, PeerCounters, Sums

#: Most groups into which a layer's rows for a server are split; each is a call (native/calls.h).
MOST_GROUPS = 4
#: Most unanswered calls from a caller to a callee: one per group, and a repeat of another server's.
MOST_UNANSWERED = MOST_GROUPS + 1

#: Computes local experts: (x float32 [n, d], experts int [n, k] by their numbers in the model or
#: -1, weights float32 [n, k]) -> (sums float32 [n, d], bool [n, k], False where an expert is not
#: here). Any thread may call it.
Compute = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class CallSpec:
    """Constants of a server that makes expert calls.

    Raises:
        ValueError: there are more servers, layers or experts than a call can name, or the order
            does not list each server once.
    """

    rank: int
    #: All servers, in the order in which this one prefers to call them (placement/visit.py).
    order: tuple[int, ...]
    #: Number of layers with routed experts, and experts of each layer.
    layers: int
    experts: int
    wire: Wire
    #: Most rows of a call, which is the tokens of one device in a step.
    most_rows: int
    #: Most experts of a row.
    k: int
    #: See `calls.REPEAT_S`.
    repeat_s: float = REPEAT_S
    fail_s: float = FAIL_S

    def __post_init__(self) -> None:
        check_named(self.order, self.layers, self.experts)

    @property
    def servers(self) -> int:
        return len(self.order)


class Table(NamedTuple):
    """Holders of all experts in one version of the placement."""

    version: int
    #: bool [l, e], the experts of this server.
    own: np.ndarray
    #: Bitmasks of the servers that hold each expert, by layer and expert.
    holders: list[list[int]]


class HostState:
    """State shared by a server's callers and its answerer.

    Implements most of `calls.ExpertCalls`. Any thread may call the methods.
    """

    def __init__(self, spec: CallSpec, compute: Compute) -> None:
        self.spec, self._compute = spec, compute
        nobody = np.zeros((spec.servers, spec.layers, spec.experts), bool)
        #: The table in force, then the staged tables in order.
        self.tables = (self._new_table(0, nobody),)
        self.cancelled = False
        #: Grows while a layer's calls are made and awaited.
        self.progress = 0
        #: Number of the current step of this server; its calls carry the number.
        self.step = 0
        #: Guards changes of tables, counters and the trace.
        self._lock = threading.Lock()
        self._peers = [PeerCounters() for _ in range(spec.servers)]
        self._rows = np.zeros((spec.layers, spec.servers), np.int64)
        self._sums = Sums()
        #: For each layer, the last step in which the layer waited for other servers.
        self._waited = [-1] * spec.layers
        #: Events of the trace; `_most_events` is 0 if there is no trace.
        self._events: list[TraceEvent] = []
        self._most_events = self._lost_events = 0

    def use(self, version: int, resident_nle: np.ndarray) -> None:
        table = self._new_table(version, resident_nle)
        with self._lock:
            self.tables = (table, *(each for each in self.tables if each.version > version))

    def stage(self, version: int, resident_nle: np.ndarray) -> None:
        table = self._new_table(version, resident_nle)
        with self._lock:
            self.tables = (*self.tables, table)

    def drop(self, version: int) -> None:
        with self._lock:
            in_force, *staged = self.tables
            self.tables = (in_force, *(each for each in staged if each.version < version))

    def _new_table(self, version: int, resident_nle: np.ndarray) -> Table:
        shape = self.spec.servers, self.spec.layers, self.spec.experts
        if resident_nle.shape != shape:
            raise ValueError(f"the placement has shape {resident_nle.shape}, expected {shape}")
        bytes_leb = np.packbits(resident_nle, axis=0, bitorder="little").transpose(1, 2, 0)
        holders = [[int.from_bytes(each.tobytes(), "little") for each in own] for own in bytes_leb]
        return Table(version, resident_nle[self.spec.rank].copy(), holders)

    def beats(self) -> int:
        return self.progress

    def cancel(self) -> None:
        self.cancelled = True

    def begin_step(self, step: int) -> None:
        self.step = step

    def compute(
        self, layer: int, x_nd: np.ndarray, expert_nk: np.ndarray, weight_nk: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute local experts like `Compute`, but with expert numbers within a layer."""
        number_nk = np.where(expert_nk >= 0, layer * self.spec.experts + expert_nk, -1)
        return self._compute(x_nd, number_nk, weight_nk)

    def count(self, peer: int, **more: int) -> None:
        """Add to the `PeerCounters` of a peer."""
        with self._lock:
            _add(self._peers[peer], more)

    def count_call(self, peer: int, layer: int, rows: int, size: int) -> None:
        """Count a sent call with `rows` rows and `size` bytes."""
        with self._lock:
            _add(self._peers[peer], {"calls": 1, "rows": rows, "bytes_sent": size})
            self._rows[layer, peer] += rows

    def count_away(self, layer: int, rows: int) -> None:
        """Count rows of a layer in the current step that need calls to other servers."""
        with self._lock:
            new = self._waited[layer] != self.step
            _add(self._sums, {"layers_waited": new, "rows_away": rows})
            self._waited[layer] = self.step

    def sum(self, **more: float | Moved) -> None:
        """Add to `Sums`."""
        with self._lock:
            _add(self._sums, more)

    def counters(self) -> Counters:
        with self._lock:
            peers = tuple(dataclasses.replace(each) for each in self._peers)
            return Counters(peers, self._rows.copy(), dataclasses.replace(self._sums))

    def sums(self) -> Sums:
        with self._lock:
            return dataclasses.replace(self._sums)

    def start_trace(self, most: int = TRACE_EVENTS) -> None:
        self._most_events = most

    def record(self, event: TraceEvent) -> None:
        """Add an event to the trace, if there is a trace."""
        with self._lock:
            if len(self._events) < self._most_events:
                self._events.append(event)
            elif self._most_events:
                self._lost_events += 1

    def take_trace(self) -> tuple[list[TraceEvent], int]:
        with self._lock:
            taken = self._events, self._lost_events
            self._events, self._lost_events = [], 0
        return taken


def _add(counted: PeerCounters | Sums, more: Mapping[str, float | Moved]) -> None:
    for name, value in more.items():
        setattr(counted, name, getattr(counted, name) + value)
