"""The state of a migration: batch after batch, each applied on all servers or on none."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from dance_jax.launch.control.protocol import Change, ExpertLoad, Stage
from dance_jax.placement.core import Layout
from dance_jax.placement.migration import MoveBatch, changed


class Migration:
    """Tracks the batch in progress and the servers that have applied it.

    Args:
        layout: the current layout.
        batches: in order; at least one.
        number: of the first batch; the others follow.
    """

    def __init__(self, layout: Layout, batches: Sequence[MoveBatch], number: int) -> None:
        #: Applied on all servers.
        self.layout = layout
        self._left = collections.deque(batches)
        #: Number of the batch in progress.
        self.number = number
        #: Experts loaded by applied batches, on all servers.
        self.moved = 0
        #: At least one batch is applied.
        self.begun = False
        self._missing = set(range(len(layout.devices)))

    @property
    def complete(self) -> bool:
        """Whether all batches are applied."""
        return not self._left

    def stages(self) -> list[Stage]:
        """The command for each server to load the current batch."""
        batch = self._left[0]
        changes: list[Change] = [*batch.changes]
        return [Stage(self.number, changes, each) for each in _loads(self.layout, batch)]

    def applied(self, rank: int, number: int) -> bool:
        """Record that a server has applied a batch; returns whether all servers have."""
        if number != self.number:
            return False
        self._missing.discard(rank)
        return not self._missing

    def commit(self) -> None:
        """Record that the current batch is applied; the next one may begin."""
        batch = self._left.popleft()
        self.layout = changed(self.layout, batch.changes)
        self.begun = True
        self.moved += len(batch.loads())
        self.number += 1
        self._missing = set(range(len(self.layout.devices)))


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
