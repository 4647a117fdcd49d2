"""What users ask for: the statistics of all engines, over one engine after another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from dance_jax.engine.moved import seconds_per_byte, seconds_per_call
from dance_jax.engine.report import STEP_SIZES, EngineStats
from dance_jax.launch.planning.costs import MeasuredCosts, ServerLoad
from dance_jax.models.counters import NOTHING_MOVED, Moved
from dance_jax.placement.decay import DecayedCounts

#: Expert calls whose mean time says how long one takes.
LEAST_CALLS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """As of one moment."""

    #: float64 [servers, layers, experts], expert calls, older ones weigh less.
    counts: np.ndarray
    #: Per server int16 [tokens, layers, k], a sample in which older tokens are fewer.
    routes: tuple[np.ndarray, ...]


class Workload:
    """Gathers what the engines have counted since they were asked last.

    Args:
        shape: (servers, layers, experts).
        k: experts that a token chooses.
        devices: of all servers.
        half_life_s: see `RebalanceOptions`.
        before: of an earlier service.
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
        #: Nothing was computed between the last two times that engines were asked.
        self.idle = False
        self._shape, self._no_routes = shape, np.zeros((0, layers, k), np.int16)
        self._half_life_s, self._devices = half_life_s, devices
        #: What the present engines had counted when they were asked last.
        self._counted, self._computed = np.zeros(shape), np.zeros(servers)
        self._sent, self._stepped = np.zeros((servers, 2)), np.zeros((servers, STEP_SIZES, 2))
        self._costs = [_Costs()] * servers
        self._measured = [MeasuredCosts()] * servers
        self._begin_counts(now)
        if before is not None:
            self._old_routes = list(before.routes)
            self._routes = list(before.routes)
            self._counts.add(before.counts, now)

    def _begin_counts(self, now: float) -> None:
        """Nothing is known of what users ask for."""
        servers = self._shape[0]
        #: Expert calls; tokens; hidden states of all servers, and those through the busiest link of
        #: each layer; steps of each size and their rows; seconds of devices in experts.
        self._counts, self._tokens, self._rows, self._steps, self._experts_s = (
            DecayedCounts(self._half_life_s) for _ in range(5)
        )
        self._counts.add(np.zeros(self._shape), now)
        self._tokens.add(np.zeros(servers), now)
        self._rows.add(np.zeros(2), now)
        self._steps.add(np.zeros((STEP_SIZES, 2)), now)
        self._experts_s.add(np.zeros(()), now)
        #: Samples of engines that are gone, which fill up those of the present ones; since when.
        self._old_routes, self._old_since = [self._no_routes] * servers, now
        self._routes = list(self._old_routes)
        self.engines_began(now)

    def engines_began(self, now: float) -> None:
        """The first ones: nobody could ask for anything before."""
        self._begin = self._asked = now

    def migrated(self, now: float) -> None:
        """Experts are where they are best: what never fades accumulates anew (arXiv:2508.12851)."""
        if self._half_life_s is None:
            self._begin_counts(now)

    @property
    def measured(self) -> list[MeasuredCosts]:
        """By server."""
        return list(self._measured)

    def load(self, now: float) -> ServerLoad:
        """The load of the servers; later counts weigh more."""
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

    def update(self, stats: Sequence[bytes], now: float) -> None:
        """Adds what all engines have counted.

        Args:
            stats: EngineStats of each server.
            now: time.monotonic().
        """
        share = _unfaded(now - self._asked, self._half_life_s)
        self._asked = now
        found = [msgspec.msgpack.decode(each, type=EngineStats) for each in stats]
        counts_nle = np.array([each.counts for each in found], np.float64)
        tokens_n = np.array([each.tokens for each in found], np.float64)
        self.idle = bool((tokens_n == self._computed).all())
        new_nle = counts_nle - self._counted
        # Counters on the devices have 32 bits.
        self._counts.add(share * (new_nle + (new_nle < 0) * 2.0**32), now)
        self._tokens.add(share * (tokens_n - self._computed), now)
        rows_n2 = np.array([(each.rows, each.busiest_rows) for each in found], np.float64)
        # Servers that step together all count those of all: the share is the same.
        self._rows.add(share * (rows_n2 - self._sent).sum(0), now)
        stepped = np.array([each.step_rows for each in found], np.float64)
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
            costs = _Costs(each.expert_seconds, each.calls_served, each.sums.moved)
            self._measured[rank] = costs.since(self._costs[rank], self._measured[rank])
            self._costs[rank] = costs

    def engines_died(self, ranks: Iterable[int], now: float) -> None:
        """Those of these servers: their counters begin anew."""
        self._old_since = now
        for rank in ranks:
            self._old_routes[rank] = self._routes[rank]
            self._counted[rank], self._computed[rank], self._sent[rank] = 0, 0, 0
            self._stepped[rank] = 0
            self._costs[rank] = _Costs()

    def statistics(self, now: float) -> Statistics:
        """As of now."""
        return Statistics(self._counts.value(now), tuple(self._routes))

    def token_rates(self, now: float) -> np.ndarray:
        """Tokens a second that each server computes, float64 [servers]; later ones weigh more."""
        return self._tokens.value(now) / self._seconds(now)

    def _seconds(self, now: float) -> float:
        """Seconds since counting began, weighted as counts are: older ones weigh less."""
        seconds = max(now - self._begin, 1e-3)
        return seconds * _unfaded(seconds, self._half_life_s)

    def _filled(self, rank: int, new: np.ndarray, now: float) -> np.ndarray:
        """The engine's sample; while it is small, with what is left of the one before."""
        old, faded = self._old_routes[rank], 1.0
        if self._half_life_s is not None:
            faded = 0.5 ** ((now - self._old_since) / self._half_life_s)
        left = max(0, int(faded * len(old)) - len(new))
        return np.concatenate([new, old[:left]])


def _unfaded(seconds: float, half_life_s: float | None) -> float:
    """What is left, in the mean, of what came evenly over so many seconds up to now."""
    if half_life_s is None or seconds <= 0:
        return 1.0
    faded = seconds * math.log(2) / half_life_s
    return -math.expm1(-faded) / faded


@dataclasses.dataclass(frozen=True)
class _Costs:
    """What an engine has measured since its start."""

    expert_seconds: float = 0.0
    calls: int = 0
    moved: Moved = NOTHING_MOVED

    def since(self, before: _Costs, known: MeasuredCosts) -> MeasuredCosts:
        """By what was done since then; where that is too little, since the start, or as known."""
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
