"""Lost servers: what they miss, what they take away, and the way back.

While a server is lost, the others load the experts that only it has (`placement.recovery`). A
server that is back has an older layout than the others. It is told what has changed, and takes part
in batches once it has the layout in force.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from dance_jax.launch.control import protocol
from dance_jax.launch.planning.loss import most_urgent_loads
from dance_jax.launch.rebalance.batches import Phase, Rollout
from dance_jax.launch.rebalance.decision import most_loads
from dance_jax.memory import format_bytes
from dance_jax.placement.core import Layout
from dance_jax.placement.migration import MoveBatch, difference
from dance_jax.placement.recovery import recovery, restoration, uncovered

#: Seconds until the loading of experts that failed is tried again.
RETRY_S = 5.0


class ServiceAccess(Protocol):
    """What the rebalancer uses of the service: front ends, messages and the layout."""

    #: The layout that is applied on all servers; the rebalancer replaces it as experts move.
    layout: Layout

    @property
    def present(self) -> frozenset[int]:
        """Ranks of the servers that run."""
        ...

    @property
    def gone(self) -> frozenset[int]:
        """Ranks of the servers that are gone with their front ends."""
        ...

    @property
    def epoch(self) -> int:
        """Number that grows whenever `present` changes."""
        ...

    def tell(self, rank: int, command: protocol.FrontCommand) -> None: ...

    def tell_all(self, command: protocol.FrontCommand) -> None: ...

    def restart(self, rank: int, why: str) -> None:
        """Restart a server's engine."""
        ...

    def notice(self, name: str, text: str) -> None: ...


class Losses:
    """Knows the layout of each server, and what to load because servers are lost or back.

    Args:
        names: of the servers, by rank, "" for vacant seats; the rebalancer changes them.
        service: to tell servers that are back what has changed.
        expert_bytes: bytes of an expert.
        numbers: of batches.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        names: Sequence[str],
        service: ServiceAccess,
        expert_bytes: int,
        numbers: Iterator[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._names, self._service, self._expert_bytes = names, service, expert_bytes
        #: Experts that a device loads in one batch while sequences wait for them.
        self._most = most_urgent_loads(expert_bytes)
        self._numbers, self._clock = numbers, clock
        #: The layout without losses: decisions make it, and restoration leads back to it.
        self.home = service.layout
        #: Ranks of servers that are about to leave: the others load what only these have.
        self.leaving: frozenset[int] = frozenset()
        #: Why requests cannot be answered: experts that no server has; "": they can.
        self.short = ""
        #: By rank, the layout that the server has, or had when it was lost.
        self._known = {rank: service.layout for rank in range(len(names))}
        #: By rank, the batch that tells a server what has changed.
        self._following: dict[int, Rollout] = {}
        #: For this layout and these servers there is nothing to recover.
        self._settled: object = None
        #: When experts that could not be loaded are tried again.
        self._retry_at = float("-inf")

    @property
    def current(self) -> frozenset[int]:
        """Ranks of the servers that run and have the layout in force."""
        layout = self._service.layout
        return frozenset(rank for rank in self._service.present if self._known[rank] is layout)

    @property
    def _staying(self) -> frozenset[int]:
        return self._service.present - self.leaving

    @property
    def uncovered(self) -> np.ndarray:
        """Experts that no server has that runs and stays, bool [layers, experts]."""
        return uncovered(self._service.layout, self._staying)

    @property
    def absent(self) -> list[str]:
        """Names of the servers that do not run, or are about to leave."""
        there = self._staying
        return [name for rank, name in enumerate(self._names) if name and rank not in there]

    def started(self, rank: int) -> None:
        """An engine is started with the layout in force."""
        self._known[rank] = self._service.layout

    def lost(self, rank: int) -> None:
        """A server is lost; it keeps the layout that it has, unless its engine is started again."""
        self._retry_at = float("-inf")
        following = self._following.pop(rank, None)
        if following is not None and following.abandon():
            self.applied(following)

    def returned(self) -> None:
        """A server is back."""
        self._retry_at = float("-inf")
        if self.short and not self.uncovered.any():
            self.short = ""

    def knows(self, rank: int, layout: Layout) -> None:
        """A server has this layout, as it says itself."""
        self._known[rank] = layout

    def reseated(self, layout: Layout, told: Iterable[int]) -> None:
        """A server has joined or left.

        Args:
            layout: in force from now on.
            told: ranks of the servers that have it.
        """
        self._known |= dict.fromkeys(told, layout)
        self.home = layout

    def shortage_without(self, rank: int, calls_nle: np.ndarray) -> str:
        """Why a server cannot leave, because the others do not suffice; "" if it can.

        Args:
            rank: of the server.
            calls_nle: float [servers, layers, experts], expert calls of each server's tokens.
        """
        others = self._service.present - {rank}
        if not others:
            return "no other server runs"
        layout, holders = self._service.layout, self._service.layout.holders
        if len(others) < holders:
            return f"--survive {holders - 1} needs {holders} servers"
        experts = self.home.resident[0].size
        # A server holds an expert once.
        room = sum(min(int(layout.capacities[n]), experts) for n in others)
        if holders > 1 and (missing := holders * experts - room) > 0:
            lack = format_bytes(missing * self._expert_bytes)
            return f"--survive {holders - 1} needs {lack} more memory for experts on the others"
        batches = recovery(layout, self.home, others, calls_nle, self._most)
        loads = sum(len(each.loads()) for each in batches)
        missing = int(uncovered(layout, others).sum()) - loads
        lack = format_bytes(missing * self._expert_bytes)
        return (missing and f"the others lack {lack} of memory for {missing} experts") or ""

    def applied(self, rollout: Rollout) -> None:
        """Servers have applied a batch."""
        self._known |= dict.fromkeys(rollout.parties, rollout.after)

    def failed(self) -> None:
        """Experts of lost servers, or those that lost servers had, could not be loaded."""
        self._retry_at, self._settled = self._clock() + RETRY_S, None

    def receive(self, rank: int, event: protocol.Event) -> None:
        """Handle an event of an engine."""
        if rank in self._following:
            self._following[rank].receive(rank, event)

    def tick(self) -> None:
        """Tell servers that are back what has changed on the others; call this often."""
        for rank, rollout in list(self._following.items()):
            rollout.tick()
            if rollout.phase is Phase.APPLIED:
                del self._following[rank]
                self.applied(rollout)
            elif (why := rollout.failure[1]) and rank in self._following:
                del self._following[rank]
                self._service.restart(rank, f"it cannot follow the placement: {why}")
        for rank in self._service.present - self.current - self._following.keys():
            self._follow(rank)

    def _follow(self, rank: int) -> None:
        layout = self._service.layout
        if not (changes := difference(self._known[rank], layout)):
            self._known[rank] = layout
            return
        # Only servers that have the layout load experts, so this one has none to load.
        stage = protocol.Stage(next(self._numbers), [*changes], [])
        service = self._service
        self._following[rank] = Rollout(
            {rank: stage}, layout, self._names, service.tell, self._clock
        )

    def recovery(self, calls: Callable[[], np.ndarray]) -> list[MoveBatch]:
        """What servers load now of the experts that only lost ones have; and updates `short`.

        Args:
            calls: float [servers, layers, experts], expert calls of each server's tokens.
        """
        service = self._service
        state = service.layout, self._staying, self.current, service.gone
        if state == self._settled or self._clock() < self._retry_at or not self.current:
            return []
        missing, batches = int(self.uncovered.sum()), []
        if missing:
            at = service.layout, self.home, self._staying
            batches = recovery(*at, calls(), self._most, self.current - self.leaving)
        self.short = self._shortage(missing - sum(len(batch.loads()) for batch in batches))
        if not batches:
            self._settled = state
        return batches

    def _shortage(self, missing: int) -> str:
        """What to tell users if so many experts cannot be loaded; "" if they come back soon.

        An engine that ended is back soon. A whole server is not, until it runs again.
        """
        if not missing or not (self.short or self._service.gone):
            return ""
        if self.current != self._service.present:  # the others may have memory
            return self.short
        text = (
            f"no server has {missing} of the model's experts while {', '.join(self.absent)} is "
            f"gone, and the others lack {format_bytes(missing * self._expert_bytes)} of memory to "
            "load them"
        )
        if text != self.short:
            self._service.notice("", text)
        return text

    def restoration(self) -> list[MoveBatch]:
        """What moves, now that all servers run again."""
        if self.home is self._service.layout or self._clock() < self._retry_at:
            return []
        batches = restoration(self._service.layout, self.home, most_loads(self._expert_bytes))
        if not batches:
            self.home = self._service.layout
        return batches
