"""The workload: statistics of all engines, accumulated over engine restarts."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

import msgspec
import numpy as np

from dance_jax.engine.moved import seconds_per_byte, seconds_per_call
from dance_jax.engine.report import STEP_SIZES, EngineStats
from dance_jax.launch.planning.costs import MeasuredCosts, ServerLoad
from dance_jax.models.counters import NOTHING_MOVED, Moved
from dance_jax.placement.decay import DecayedCounts

#: Expert calls from which the mean time of a call is reliable.
LEAST_CALLS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics at one moment."""

    #: float64 [servers, layers, experts], expert calls; older calls weigh less.
    counts: np.ndarray
    #: Per server int16 [tokens, layers, k], a sample that favours recent tokens.
    routes: tuple[np.ndarray, ...]

    def with_seats(self, count: int) -> Statistics:
        """These statistics, with servers without requests up to `count`."""
        more = count - len(self.routes)
        return Statistics(
            np.pad(self.counts, ((0, more), (0, 0), (0, 0))),
            (*self.routes, *(self.routes[0][:0],) * more),
        )


class Workload:
    """Accumulates the counters of the engines.

    Args:
        shape: (servers, layers, experts).
        k: experts that a token chooses.
        devices: number of devices of all servers.
        half_life_s: see `RebalanceOptions`.
        before: statistics of a previous service.
        now: time.monotonic().
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        k: int,
        devices: int,
        half_life_s: float | None,
        before: Statistics | None,
        now: float,
    ) -> None:
        servers, layers, _ = shape
        #: No token was computed between the last two updates.
        self.idle = False
        self._shape, self._no_routes = shape, np.zeros((0, layers, k), np.int16)
        self._half_life_s, self._devices = half_life_s, devices
        #: Counters of the current engines at the last update.
        self._counted, self._computed = np.zeros(shape), np.zeros(servers)
        self._sent, self._stepped = np.zeros((servers, 2)), np.zeros((servers, STEP_SIZES, 2))
        self._costs = [_Costs()] * servers
        #: Servers whose engines ran before this object was made.
        self._unknown: set[int] = set()
        self._measured = [MeasuredCosts()] * servers
        self._begin_counts(now)
        if before is not None:
            self._old_routes = list(before.routes)
            self._routes = list(before.routes)
            self._counts.add(before.counts, now)

    def _begin_counts(self, now: float) -> None:
        """Start counting from zero."""
        servers = self._shape[0]
        #: Expert calls; tokens; hidden states (of all servers, through the busiest link of each
        #: layer); steps and rows of each step size; device seconds in experts.
        self._counts, self._tokens, self._rows, self._steps, self._experts_s = (
            DecayedCounts(self._half_life_s) for _ in range(5)
        )
        self._counts.add(np.zeros(self._shape), now)
        self._tokens.add(np.zeros(servers), now)
        self._rows.add(np.zeros(2), now)
        self._steps.add(np.zeros((STEP_SIZES, 2)), now)
        self._experts_s.add(np.zeros(()), now)
        #: Route samples of dead engines, which fill up those of the current ones; their time.
        self._old_routes, self._old_since = [self._no_routes] * servers, now
        self._routes = list(self._old_routes)
        self.engines_began(now)

    def engines_began(self, now: float) -> None:
        """Start the clock: before the first engines ran, no requests could arrive."""
        self._begin = self._asked = now

    def migrated(self, now: float) -> None:
        """Restart the counts after a migration if they never fade (arXiv:2508.12851)."""
        if self._half_life_s is None:
            self._begin_counts(now)

    @property
    def measured(self) -> list[MeasuredCosts]:
        """Measured costs by server."""
        return list(self._measured)

    def load(self, now: float) -> ServerLoad:
        """The current load of the servers."""
        rows, busiest = self._rows.value(now)
        steps_i, rows_i = self._steps.value(now).T
        device_s = self._devices * self._seconds(now)
        used = steps_i > 0
        return ServerLoad(
            rows=tuple(
                zip((rows_i[used] / steps_i[used]).tolist(), steps_i[used].tolist(), strict=True)
            ),
            busy=float(np.clip(self._experts_s.value(now) / device_s, 0, 1))
            if used.any()
            else None,
            busiest=float(busiest / rows) if rows > 0 else None,
        )

    def update(self, stats: Mapping[int, bytes], now: float) -> None:
        """Add the counters of all engines.

        Args:
            stats: EngineStats by rank, of all servers; vacant seats have none.
            now: time.monotonic().
        """
        share = _unfaded(now - self._asked, self._half_life_s)
        self._asked = now
        found = [
            msgspec.msgpack.decode(stats[rank], type=EngineStats) if rank in stats else self._nobody
            for rank in range(self._shape[0])
        ]
        counts_nle = np.array([each.counts for each in found], np.float64)
        tokens_n = np.array([each.tokens for each in found], np.float64)
        rows_n2 = np.array([(each.rows, each.busiest_rows) for each in found], np.float64)
        stepped = np.array([each.step_rows for each in found], np.float64)
        for rank in self._unknown:
            self._counted[rank], self._computed[rank] = counts_nle[rank], tokens_n[rank]
            self._sent[rank], self._stepped[rank] = rows_n2[rank], stepped[rank]
            self._costs[rank] = _Costs.of(found[rank])
        self._unknown.clear()
        self.idle = bool((tokens_n == self._computed).all())
        new_nle = counts_nle - self._counted
        # The devices' counters have 32 bits and may wrap around.
        self._counts.add(share * (new_nle + (new_nle < 0) * 2.0**32), now)
        self._tokens.add(share * (tokens_n - self._computed), now)
        # Servers that step together each count the totals; the ratio is the same.
        self._rows.add(share * (rows_n2 - self._sent).sum(0), now)
        self._steps.add(share * (stepped - self._stepped).sum(0), now)
        experts_s = sum(
            each.expert_seconds - costs.expert_seconds
            for each, costs in zip(found, self._costs, strict=True)
        )
        self._experts_s.add(np.array(share * max(experts_s, 0.0)), now)
        self._counted, self._computed, self._sent = counts_nle, tokens_n, rows_n2
        self._stepped = stepped
        for rank, each in enumerate(found):
            self._routes[rank] = self._filled(rank, each.routes_tlk, now)
            costs = _Costs.of(each)
            self._measured[rank] = costs.since(self._costs[rank], self._measured[rank])
            self._costs[rank] = costs

    @functools.cached_property
    def _nobody(self) -> EngineStats:
        """The statistics of a vacant seat."""
        _, layers, experts = self._shape
        none = [[0] * experts for _ in range(layers)]
        k = self._no_routes.shape[2]
        return EngineStats(none, [], [], 0, 0, b"", k, [], [(0, 0)] * STEP_SIZES)

    def reseated(self, rank: int, devices: int, devices_before: int) -> None:
        """A server without a past takes the place of one, or nobody does.

        Args:
            rank: of both.
            devices, devices_before: number of devices of the new one, and of the old one.
        """
        self._devices += devices - devices_before
        self.engines_died([rank], self._asked)
        self._old_routes[rank] = self._routes[rank] = self._no_routes
        self._measured[rank] = MeasuredCosts()
        for each in (self._counts, self._tokens):
            each.clear(rank)

    def engines_died(self, ranks: Iterable[int], now: float) -> None:
        """Reset the counters of these servers' engines."""
        self._old_since = now
        for rank in ranks:
            self._unknown.discard(rank)
            self._old_routes[rank] = self._routes[rank]
            self._counted[rank], self._computed[rank], self._sent[rank] = 0, 0, 0
            self._stepped[rank] = 0
            self._costs[rank] = _Costs()

    def goes_on(self, rank: int) -> None:
        """A server's engine has counted before, which the next `update` leaves out."""
        self._unknown.add(rank)

    def statistics(self, now: float) -> Statistics:
        """The statistics at this moment."""
        return Statistics(self._counts.value(now), tuple(self._routes))

    def token_rates(self, now: float) -> np.ndarray:
        """Tokens per second of each server, float64 [servers]; recent tokens weigh more."""
        return self._tokens.value(now) / self._seconds(now)

    def _seconds(self, now: float) -> float:
        """Seconds since counting began, weighted like the counts."""
        seconds = max(now - self._begin, 1e-3)
        return seconds * _unfaded(seconds, self._half_life_s)

    def _filled(self, rank: int, new: np.ndarray, now: float) -> np.ndarray:
        """The engine's route sample, filled up from the previous engine's sample while small."""
        old, faded = self._old_routes[rank], 1.0
        if self._half_life_s is not None:
            faded = 0.5 ** ((now - self._old_since) / self._half_life_s)
        left = max(0, int(faded * len(old)) - len(new))
        return np.concatenate([new, old[:left]])


def _unfaded(seconds: float, half_life_s: float | None) -> float:
    """Mean weight left now of counts that arrived evenly over the last `seconds`."""
    if half_life_s is None or seconds <= 0:
        return 1.0
    faded = seconds * math.log(2) / half_life_s
    return -math.expm1(-faded) / faded


@dataclasses.dataclass(frozen=True)
class _Costs:
    """Cost counters of an engine since its start."""

    expert_seconds: float = 0.0
    calls: int = 0
    moved: Moved = NOTHING_MOVED

    @staticmethod
    def of(stats: EngineStats) -> _Costs:
        return _Costs(stats.expert_seconds, stats.calls_served, stats.sums.moved)

    def since(self, before: _Costs, known: MeasuredCosts) -> MeasuredCosts:
        """Costs since `before`; if too few calls, since the start, or else the known costs."""
        calls = self.calls - before.calls
        byte_s, round_s = known.byte_s, known.round_s
        for moved in (self.moved, self.moved - before.moved):
            byte_s = _or(seconds_per_byte(moved), byte_s)
            round_s = _or(seconds_per_call(moved, byte_s), round_s)
        call_s = known.call_s
        if calls >= LEAST_CALLS:
            call_s = (self.expert_seconds - before.expert_seconds) / calls
        return MeasuredCosts(byte_s, call_s, round_s)


def _or(found: float | None, known: float | None) -> float | None:
    return known if found is None else found
