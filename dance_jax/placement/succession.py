"""Which slot an expert takes that comes to a device, of those that others leave.

An expert whose copies all leave their slots may not be overwritten before it is loaded elsewhere.
Two such experts that take each other's slots must be loaded at once, and so must all in a longer
circle. Slots are therefore given out in the shortest circles there are: each such expert is an edge
from a device that loses it to one that gets it, and as long as edges close circles, those of the
shortest circle follow each other. It visits no device twice. What is left has no circle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

#: (server, local device).
Device = tuple[int, int]
#: Experts (layer, expert) on the way from one device to another.
Edges = dict[tuple[Device, Device], list[tuple[int, int]]]
#: (server, layer, expert): a copy.
Copy = tuple[int, int, int]


def successors(
    stays_nle: np.ndarray,
    device_nle: np.ndarray,
    old_device_nle: np.ndarray,
    old_slot_nle: np.ndarray,
    slots_per_device: Sequence[int],
) -> np.ndarray:
    """Slots of the experts that come to a device, int32 [servers, layers, experts]; else -1.

    Args:
        stays_nle: bool, experts that keep device and slot.
        device_nle: int32, the device to which an expert comes; -1: it does not.
        old_device_nle, old_slot_nle: int32, where experts are before; -1: not there.
        slots_per_device: int [servers].
    """
    slot_nle = np.full_like(device_nle, -1)
    for heir, left in _circles(_edges(stays_nle, device_nle, old_device_nle)):
        slot_nle[heir] = old_slot_nle[left]
    # Those in no circle take what is free, in order.
    for server, slots in enumerate(slots_per_device):
        comes_le, new_slot_le = device_nle[server], slot_nle[server]
        for device in np.unique(comes_le[comes_le >= 0]):
            kept_le = stays_nle[server] & (old_device_nle[server] == device)
            given_le = (comes_le == device) & (new_slot_le >= 0)
            taken = [*old_slot_nle[server][kept_le], *new_slot_le[given_le]]
            waiting = np.nonzero((comes_le == device) & (new_slot_le < 0))
            free = np.setdiff1d(np.arange(slots), taken)
            new_slot_le[waiting] = free[: len(waiting[0])]
    return slot_nle


def _edges(stays_nle: np.ndarray, device_nle: np.ndarray, old_device_nle: np.ndarray) -> Edges:
    """The experts that stay nowhere; of several devices they leave or come to, one each."""
    edges: Edges = {}
    for layer, expert in np.argwhere(~stays_nle.any(0)).tolist():
        source = _first(old_device_nle[:, layer, expert])
        target = _first(device_nle[:, layer, expert])
        edges.setdefault((source, target), []).append((layer, expert))
    return edges


def _first(device_n: np.ndarray) -> Device:
    server = int(np.argmax(device_n >= 0))
    return server, int(device_n[server])


def _circles(edges: Edges) -> Iterator[tuple[Copy, Copy]]:
    """Who comes, and who leaves its slot to it; takes the circles out of `edges`."""
    while circle := _shortest_circle(edges):
        ways = list(zip(circle, [*circle[1:], circle[0]], strict=True))
        for _ in range(min(len(edges[way]) for way in ways)):
            coming = [edges[way].pop(0) for way in ways]
            leaving = [*coming[1:], coming[0]]
            for (_, (server, _)), heir, left in zip(ways, coming, leaving, strict=True):
                yield (server, *heir), (server, *left)
        for way in ways:
            if not edges[way]:
                del edges[way]


def _shortest_circle(edges: Edges) -> list[Device]:
    """Devices in order, from each of which an edge leads to the next; none: there is no circle."""
    after: dict[Device, list[Device]] = {}
    for source, target in sorted(edges):
        after.setdefault(source, []).append(target)
    circles = [circle for start in after if (circle := _circle_through(start, after))]
    return min(circles, key=len, default=[])


def _circle_through(start: Device, after: dict[Device, list[Device]]) -> list[Device]:
    """The shortest one by breadth-first search."""
    came_from: dict[Device, Device] = {}
    queue = deque([start])
    while queue:
        device = queue.popleft()
        for target in after.get(device, ()):
            if target == start:
                way = [device]
                while way[-1] != start:
                    way.append(came_from[way[-1]])
                return way[::-1]
            if target not in came_from:
                came_from[target] = device
                queue.append(target)
    return []
