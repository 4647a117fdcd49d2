"""Experts that lose their last holder are loaded by the servers that are left.

A lost server keeps its slots in the layout, because it finds them there when it comes back. Until
then its experts count only where another server has them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from dance_jax.placement.core import Layout
from dance_jax.placement.migration import (
    Device,
    Expert,
    MoveBatch,
    SlotChange,
    batches,
    changed,
)


def uncovered(layout: Layout, present: Collection[int]) -> np.ndarray:
    """Experts that no server present has, bool [layers, experts]."""
    return np.logical_not(layout.resident[sorted(present)].any(0))


def recovery(
    layout: Layout, present: Collection[int], calls_nle: np.ndarray, most: int
) -> list[MoveBatch]:
    """Batches after which the servers present hold as many experts as they can.

    The most called experts come first. Each goes to the server that calls it most among those with
    a slot left: an empty one, or one of an expert that another server present holds, the least
    called first. A slot is filled in a later batch than the one that empties it.

    Args:
        layout: the layout in force.
        present: ranks of the servers that run.
        calls_nle: float [servers, layers, experts], expert calls of each server's tokens.
        most: experts that a device loads in one batch.
    """
    lost_le = uncovered(layout, present)
    calls_le = calls_nle[sorted(present)].sum(0)
    rooms = {
        (server, device): _Room(layout, server, device)
        for server in sorted(present)
        for device in range(layout.devices[server])
    }
    evictable = _evictable(rooms, layout.resident[sorted(present)].sum(0), calls_le)
    for layer, expert in _by_calls(np.argwhere(lost_le), -calls_le):
        device = _best(rooms, calls_nle[:, layer, expert])
        if device is None:
            device, old = next(evictable, (None, None))
            if device is None or old is None:
                break
            rooms[device].evict(old)
        rooms[device].load((layer, expert))
    return list(_batches(rooms, most))


def restoration(layout: Layout, before: Layout, most: int) -> list[MoveBatch]:
    """Batches back to the placement before a loss, once all servers run again.

    Args:
        layout: the layout in force.
        before: the layout before the loss; `recovery` led from there to `layout`.
        most: experts that a device loads in one batch.
    """
    (present, others) = layout.resident, before.resident
    emptied = tuple(
        SlotChange(server, device, slot, -1, -1)
        for server, devices in enumerate(layout.devices)
        for device in range(devices)
        for (layer, expert), slot in _Room(layout, server, device).held.items()
        if not others[server, layer, expert] and (present & others)[:, layer, expert].any()
    )
    released = changed(layout, emptied)
    steps = [batch for batch, _ in batches(released, before, most)]
    return [MoveBatch(emptied), *steps] if emptied else steps


def _by_calls(pairs: np.ndarray, key_le: np.ndarray) -> Iterator[Expert]:
    """(layer, expert) pairs in ascending order of their keys."""
    found = [(layer, expert) for layer, expert in pairs.tolist()]
    yield from sorted(found, key=lambda pair: (key_le[pair], pair))


class _Room:
    """The slots of a device during recovery."""

    def __init__(self, layout: Layout, server: int, device: int) -> None:
        self._at = server, device
        table = layout.experts_of(server, device).tolist()
        self.held: dict[Expert, int] = {
            (layer, expert): slot for slot, (layer, expert) in enumerate(table) if layer >= 0
        }
        #: Slots to fill, with the first batch that may fill each: 1 if the slot is emptied first.
        self.free = [(slot, 0) for slot, (layer, _) in enumerate(table) if layer < 0]
        self.emptied: list[SlotChange] = []
        #: Loads in order, each with the first batch that may have it.
        self.loads: list[tuple[SlotChange, int]] = []

    def evict(self, expert: Expert) -> None:
        slot = self.held.pop(expert)
        self.emptied.append(SlotChange(*self._at, slot, -1, -1))
        self.free.append((slot, 1))

    def load(self, expert: Expert) -> None:
        slot, first = self.free.pop(0)
        self.loads.append((SlotChange(*self._at, slot, *expert), first))


def _best(rooms: dict[Device, _Room], calls_n: np.ndarray) -> Device | None:
    """The device with an empty slot whose server calls the expert most; then the emptiest."""
    open_ = [device for device, room in rooms.items() if room.free]
    return max(open_, key=lambda d: (calls_n[d[0]], len(rooms[d].free), -d[0], -d[1]), default=None)


def _evictable(
    rooms: dict[Device, _Room], copies_le: np.ndarray, calls_le: np.ndarray
) -> Iterator[tuple[Device, Expert]]:
    """Experts that another server has as well, the least called first, with their devices."""
    held = [
        (calls_le[expert], expert, device) for device, room in rooms.items() for expert in room.held
    ]
    for _, expert, device in sorted(held):
        if copies_le[expert] > 1:
            copies_le[expert] -= 1
            yield device, expert


def _batches(rooms: dict[Device, _Room], most: int) -> Iterator[MoveBatch]:
    """Deal the loads out to batches; the first batch also empties slots."""
    number = 0
    changes = [change for room in rooms.values() for change in room.emptied]
    while changes or any(room.loads for room in rooms.values()):
        for room in rooms.values():
            ready = [change for change, first in room.loads if first <= number][:most]
            room.loads = room.loads[len(ready) :]
            changes += ready
        yield MoveBatch(tuple(sorted(changes)))
        changes, number = [], number + 1
