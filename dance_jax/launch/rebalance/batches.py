"""The state of a migration: batch after batch, each applied on all servers or on none."""

from __future__ import annotations

import collections
import enum
from collections.abc import Collection, Sequence

from dance_jax.launch.control.protocol import Change, ExpertLoad, Stage
from dance_jax.placement.core import Layout
from dance_jax.placement.migration import MoveBatch, changed


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
        present: ranks of the servers that run; the others neither load nor send experts.
        purpose: why experts move.
    """

    def __init__(
        self,
        batches: Sequence[MoveBatch],
        present: Collection[int],
        purpose: Purpose = Purpose.DECIDED,
    ) -> None:
        self._left = collections.deque(batches)
        self._present, self.purpose = sorted(present), purpose
        #: Experts loaded by applied batches, on all servers.
        self.moved = 0
        #: At least one batch is applied.
        self.begun = False

    @property
    def complete(self) -> bool:
        """Whether all batches are applied."""
        return not self._left

    def stages(self, number: int, layout: Layout) -> list[Stage]:
        """The command for each server to load the current batch.

        Args:
            number: of the batch.
            layout: the layout in force.
        """
        batch = self._left[0]
        changes: list[Change] = [*batch.changes]
        loads = _loads(layout, batch, self._present)
        urgent = self.purpose is Purpose.RECOVER
        return [Stage(number, changes, each, urgent) for each in loads]

    def commit(self, layout: Layout) -> Layout:
        """Record that the current batch is applied; returns the layout after it."""
        batch = self._left.popleft()
        self.begun = True
        self.moved += len(batch.loads())
        return changed(layout, batch.changes)


def _loads(before: Layout, batch: MoveBatch, present: Sequence[int]) -> list[list[ExpertLoad]]:
    """Loads by server; each expert comes from the holder with the fewest requests so far."""
    loads: list[list[ExpertLoad]] = [[] for _ in before.devices]
    asked: collections.Counter[int] = collections.Counter()
    for server, device, slot, layer, expert in batch.loads():
        held_n = before.device_of[:, layer, expert] >= 0
        holders = [n for n in present if held_n[n] and n != server] or [
            server if held_n[server] else -1
        ]
        holder = min(holders, key=lambda n: (asked[n], n))
        asked[holder] += 1
        loads[server].append(ExpertLoad(device, slot, layer, expert, holder))
    return loads
