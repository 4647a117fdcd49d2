"""The state of a migration: batch after batch, each applied on all servers or on none."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from dance_jax.launch.control.protocol import Change, ExpertLoad, Stage
from dance_jax.placement.core import Layout
from dance_jax.placement.migration import MoveBatch, changed


class Migration:
    """Tracks which batches are left.

    Args:
        batches: in order; at least one.
    """

    def __init__(self, batches: Sequence[MoveBatch]) -> None:
        self._left = collections.deque(batches)
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
        return [Stage(number, changes, each) for each in _loads(layout, batch)]

    def commit(self, layout: Layout) -> Layout:
        """Record that the current batch is applied; returns the layout after it."""
        batch = self._left.popleft()
        self.begun = True
        self.moved += len(batch.loads())
        return changed(layout, batch.changes)


def _loads(before: Layout, batch: MoveBatch) -> list[list[ExpertLoad]]:
    """Loads by server; each expert comes from the holder with the fewest requests so far."""
    loads: list[list[ExpertLoad]] = [[] for _ in before.devices]
    asked: collections.Counter[int] = collections.Counter()
    for server, device, slot, layer, expert in batch.loads():
        held_n = before.device_of[:, layer, expert] >= 0
        holders = [n for n in held_n.nonzero()[0].tolist() if n != server] or [server]
        holder = min(holders, key=lambda n: (asked[n], n))
        asked[holder] += 1
        loads[server].append(ExpertLoad(device, slot, layer, expert, holder))
    return loads
