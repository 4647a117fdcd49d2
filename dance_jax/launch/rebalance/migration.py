"""One migration on its way: batch after batch, each on all servers or on none."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from dance_jax.launch.control.protocol import ExpertLoad, Stage
from dance_jax.placement.core import Layout
from dance_jax.placement.migration import MoveBatch, changed


class Migration:
    """Which batch is loaded now, and who has it in force.

    Args:
        layout: in force.
        batches: in their order; one at least.
        number: of the first; the others follow.
    """

    def __init__(self, layout: Layout, batches: Sequence[MoveBatch], number: int) -> None:
        #: In force on all servers.
        self.layout = layout
        self._left = collections.deque(batches)
        #: Of the batch that is loaded now.
        self.number = number
        #: Experts loaded by batches in force, on all servers.
        self.moved = 0
        #: Some batch is in force.
        self.begun = False
        self._missing = set(range(len(layout.devices)))

    @property
    def complete(self) -> bool:
        """All batches are in force."""
        return not self._left

    def stages(self) -> list[Stage]:
        """What each server is told to load now."""
        batch = self._left[0]
        changes = list(map(tuple, batch.changes))
        return [Stage(self.number, changes, each) for each in _loads(self.layout, batch)]

    def applied(self, rank: int, number: int) -> bool:
        """A server has a batch in force; whether all have."""
        if number != self.number:
            return False
        self._missing.discard(rank)
        return not self._missing

    def commit(self) -> None:
        """The batch is in force; the next one may begin."""
        batch = self._left.popleft()
        self.layout = changed(self.layout, batch.changes)
        self.begun = True
        self.moved += len(batch.loads())
        self.number += 1
        self._missing = set(range(len(self.layout.devices)))


def _loads(before: Layout, batch: MoveBatch) -> list[list[ExpertLoad]]:
    """By server; each expert comes from a holder that has been asked least for this batch."""
    loads: list[list[ExpertLoad]] = [[] for _ in before.devices]
    asked: collections.Counter[int] = collections.Counter()
    for server, device, slot, layer, expert in batch.loads():
        held_n = before.device_of[:, layer, expert] >= 0
        holders = [n for n in held_n.nonzero()[0].tolist() if n != server] or [server]
        holder = min(holders, key=lambda n: (asked[n], n))
        asked[holder] += 1
        loads[server].append(ExpertLoad(device, slot, layer, expert, holder))
    return loads
