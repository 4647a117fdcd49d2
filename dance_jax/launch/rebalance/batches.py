"""Migrations, batch after batch, each applied on all servers that take part or on none."""

from __future__ import annotations

import collections
import enum
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from dance_jax.launch.control import protocol
from dance_jax.launch.control.protocol import Change, ExpertLoad, Stage
from dance_jax.placement.core import Layout
from dance_jax.placement.migration import MoveBatch

#: Seconds after which a batch that some server has not loaded is dropped.
LOAD_TIMEOUT_S = 300.0
#: Seconds for servers to apply a loaded batch; later servers are not waited for.
COMMIT_TIMEOUT_S = 10.0
#: Seconds for servers to confirm that a batch is dropped; then they are told again.
DROP_TIMEOUT_S = 30.0

#: Sends a command to the server of a rank.
Tell = Callable[[int, protocol.FrontCommand], None]


class Purpose(enum.Enum):
    """Why experts move."""

    #: A decision: they are used elsewhere.
    DECIDED = enum.auto()
    #: Only a lost server has them, and sequences wait.
    RECOVER = enum.auto()
    #: The lost servers are back.
    RESTORE = enum.auto()


class Migration:
    """Tracks which batches are left.

    Args:
        batches: in order; at least one.
        purpose: why experts move.
        target: the layout once all batches are applied.
    """

    def __init__(self, batches: Sequence[MoveBatch], purpose: Purpose, target: Layout) -> None:
        self.left, self.purpose, self.target = collections.deque(batches), purpose, target
        #: Experts loaded by applied batches, on all servers.
        self.moved = 0
        #: At least one batch is applied.
        self.begun = False

    def applied(self) -> None:
        """Record that the first batch left is applied."""
        self.begun = True
        self.moved += len(self.left.popleft().loads())


class Phase(enum.Enum):
    """Phase of a batch."""

    #: All servers load it.
    LOADING = enum.auto()
    #: All have loaded it, and apply it.
    COMMITTING = enum.auto()
    #: One has not loaded it, so all drop it.
    DROPPING = enum.auto()
    APPLIED = enum.auto()
    DROPPED = enum.auto()


class Rollout:
    """One batch on its way: all servers that take part load it, then all apply or all drop it.

    Args:
        stages: by rank, the command to load the batch; of equal numbers.
        after: the layout once the batch is applied.
        names: of all servers, by rank.
        tell: sends a command.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        after: Layout,
        names: Sequence[str],
        tell: Tell,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.parties, self.after = frozenset(stages), after
        #: Name of a server that has not loaded the batch, and why.
        self.failure = "", ""
        self._names, self._tell, self._clock = names, tell, clock
        self._number = next(iter(stages.values())).number
        self._wait(Phase.LOADING, LOAD_TIMEOUT_S)
        for rank, stage in stages.items():
            tell(rank, stage)

    def receive(self, rank: int, event: protocol.Event) -> None:
        """Handle an event of an engine; those of other batches are ignored."""
        match event:
            case protocol.Staged(self._number) if self._all_answered(Phase.LOADING, rank):
                self._wait(Phase.COMMITTING, COMMIT_TIMEOUT_S)
                self._tell_all(protocol.Commit(self._number))
            case protocol.StageFailed(self._number, why) if self.phase is Phase.LOADING:
                self._drop(self._names[rank], why)
            case protocol.Applied(self._number) if self._all_answered(Phase.COMMITTING, rank):
                self.phase = Phase.APPLIED
            case protocol.Dropped(self._number) if self._all_answered(Phase.DROPPING, rank):
                self.phase = Phase.DROPPED

    def tick(self) -> None:
        """Handle a deadline that has passed."""
        if self._clock() < self._deadline:
            return
        match self.phase:
            case Phase.LOADING:
                late = ", ".join(self._names[rank] for rank in sorted(self._missing))
                self._drop(late, f"experts were not loaded within {LOAD_TIMEOUT_S:g} s")
            case Phase.COMMITTING:
                # Late servers answer calls with "not here" until they apply the batch too.
                self.phase = Phase.APPLIED
            case Phase.DROPPING:
                self._deadline = self._clock() + DROP_TIMEOUT_S
                self._tell_all(protocol.Drop(self._number))

    def abandon(self) -> bool:
        """Wait for no server any more, because one is lost.

        Returns:
            Whether the batch is applied: all have been told so, or else all are told to drop it.
        """
        if self.phase in (Phase.COMMITTING, Phase.APPLIED):
            return True
        self._tell_all(protocol.Drop(self._number))
        return False

    def _drop(self, name: str, why: str) -> None:
        self.failure = name, why
        self._wait(Phase.DROPPING, DROP_TIMEOUT_S)
        self._tell_all(protocol.Drop(self._number))

    def _wait(self, phase: Phase, seconds: float) -> None:
        """Enter a phase that ends when all parties have answered, or after `seconds`."""
        self.phase, self._missing = phase, set(self.parties)
        self._deadline = self._clock() + seconds

    def _all_answered(self, phase: Phase, rank: int) -> bool:
        """Record a server's answer; returns whether all have answered."""
        if self.phase is not phase or rank not in self._missing:
            return False
        self._missing.discard(rank)
        return not self._missing

    def _tell_all(self, command: protocol.FrontCommand) -> None:
        for rank in sorted(self.parties):
            self._tell(rank, command)


def stages(
    number: int, batch: MoveBatch, layout: Layout, present: Collection[int], urgent: bool
) -> list[Stage]:
    """The command for each server to load a batch.

    Each expert comes from the holder present with the fewest requests so far.

    Args:
        number: of the batch.
        batch: what changes.
        layout: the layout in force.
        present: ranks of the servers that run; the others send no experts.
        urgent: sequences wait for these experts.
    """
    loads: list[list[ExpertLoad]] = [[] for _ in layout.devices]
    asked: collections.Counter[int] = collections.Counter()
    for server, device, slot, layer, expert in batch.loads():
        held_n = layout.resident[:, layer, expert]
        holders = [n for n in sorted(present) if held_n[n] and n != server] or [
            server if held_n[server] else -1
        ]
        holder = min(holders, key=lambda n: (asked[n], n))
        asked[holder] += 1
        loads[server].append(ExpertLoad(device, slot, layer, expert, holder))
    changes: list[Change] = [*batch.changes]
    return [Stage(number, changes, each, urgent) for each in loads]
