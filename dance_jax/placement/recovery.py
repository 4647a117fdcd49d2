"""Experts that lose their last holder are loaded by the servers that are left.

A lost server keeps its slots in the layout, because it finds them there when it comes back. Until
then its experts count only where another server has them.

`home` is the layout without losses. Recovery takes an expert out of its home slot only while
another server present has it in its own home slot. So in the layout, every expert is always in one
of its home slots at least, that of a lost server perhaps. Once all servers run again, all that is
not at home can leave its slot, and every slot at home is free for its expert.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable

import numpy as np

from dance_jax.placement.core import Layout
from dance_jax.placement.migration import Device, MoveBatch, SlotChange, difference


def uncovered(layout: Layout, present: Collection[int]) -> np.ndarray:
    """Experts that no server present has, bool [layers, experts]."""
    return np.logical_not(layout.resident[sorted(present)].any(0))


def recovery(
    layout: Layout,
    home: Layout,
    present: Collection[int],
    calls_nle: np.ndarray,
    most: int,
    loaders: Collection[int] | None = None,
) -> list[MoveBatch]:
    """Batches after which the servers present hold as many experts as they can.

    The most called experts come first. Each goes to the server that calls it most among those with
    an empty slot. When no slot is empty, they take the slots of experts that another server present
    has as well: first of those that are not at home, then of the least called. A slot is filled in
    a later batch than the one that empties it.

    No plan is prepared before a loss, because this is fast: 6 to 15 ms for 61 layers of 256 experts
    on 3 to 8 servers (`research/recovery.py` on 2 cores of an x86 server).

    Args:
        layout: the layout in force.
        home: the layout without losses.
        present: ranks of the servers that run.
        calls_nle: float [servers, layers, experts], expert calls of each server's tokens.
        most: experts that a device loads in one batch.
        loaders: ranks of the servers present that may load; None: all of them.
    """
    calls_le = calls_nle[sorted(present)].sum(0)
    lost = np.argwhere(uncovered(layout, present))
    lost = lost[np.argsort(-calls_le[tuple(lost.T)], kind="stable")]
    slots = _slots(layout, present)
    may_load = np.isin(slots[:, 0], sorted(present if loaders is None else loaders))
    empty = slots[may_load & (slots[:, 3] < 0)]
    first = _to_their_users(lost[: len(empty)], empty, calls_nle)
    taken = _replicas(slots[slots[:, 3] >= 0], home, calls_nle, loaders)[: len(lost) - len(first)]
    later = np.hstack([taken[:, :3], lost[len(first) :][: len(taken)]])
    return _batches(_changes(taken), _changes(first), _changes(later), most)


def restoration(layout: Layout, home: Layout, most: int) -> list[MoveBatch]:
    """Batches back to the layout without losses, once all servers run again.

    Args:
        layout: the layout in force, to which `recovery` led.
        home: the layout without losses.
        most: experts that a device loads in one batch.
    """
    away = [change for change in difference(home, layout) if change.loads]
    missing = [change for change in difference(layout, home) if change.loads]
    return _batches(away, [], missing, most)


def _slots(layout: Layout, servers: Collection[int]) -> np.ndarray:
    """The slots of servers, int [slots, 5]: server, device, slot, layer and expert (-1: empty)."""
    parts = [np.empty((0, 5), np.int32)]
    for server in sorted(servers):
        for device in range(layout.devices[server]):
            held = layout.experts_of(server, device)
            at = np.full((len(held), 2), (server, device))
            parts.append(np.hstack([at, np.arange(len(held))[:, None], held]))
    return np.concatenate(parts)


def _changes(slots: np.ndarray) -> list[SlotChange]:
    return [SlotChange(*slot) for slot in slots.tolist()]


def _to_their_users(lost: np.ndarray, empty: np.ndarray, calls_nle: np.ndarray) -> np.ndarray:
    """Give each expert an empty slot of the server that calls it most, then of the emptiest device.

    Args:
        lost: int [experts, 2] of (layer, expert), at most as many as empty slots.
        empty: int [slots, 5], as `_slots` returns them.

    Returns:
        int [experts, 5], the slots with their new experts.
    """
    free = collections.defaultdict[Device, list[int]](list)
    for server, device, slot in empty[::-1, :3].tolist():
        free[server, device].append(slot)
    filled = []
    for expert, calls_n in zip(lost.tolist(), calls_nle[:, *lost.T].T.tolist(), strict=True):
        at = max(free, key=lambda d: (calls_n[d[0]], len(free[d]), -d[0], -d[1]))
        filled.append((*at, free[at].pop(), *expert))
        if not free[at]:
            del free[at]
    return np.array(filled, np.int64).reshape(-1, 5)


def _replicas(
    held: np.ndarray, home: Layout, calls_nle: np.ndarray, loaders: Collection[int] | None
) -> np.ndarray:
    """The slots that may be emptied while every expert keeps one, the best to empty first.

    Each expert keeps a slot at home if it has one, or else one that cannot be emptied, or else that
    of the server that calls it most.

    Args:
        held: int [slots, 5], the slots with experts of all servers present.
        loaders: ranks of the servers whose slots may be emptied; None: all.
    """
    server, device, slot, layer, expert = held.T
    at = server, layer, expert
    away = (home.device_of[at] != device) | (home.slot_of[at] != slot)
    fixed = np.zeros(len(held), bool) if loaders is None else ~np.isin(server, sorted(loaders))
    which = layer * home.device_of.shape[2] + expert
    order = np.lexsort((-calls_nle[at], 4 * which + 2 * away + ~fixed))
    again = np.zeros(len(held), bool)
    again[order[1:]] = which[order[1:]] == which[order[:-1]]
    found = np.flatnonzero(again & ~fixed)
    calls = calls_nle[sorted({*server.tolist()})].sum(0)[layer[found], expert[found]]
    return held[found[np.lexsort((calls, ~away[found]))]]


def _batches(
    emptied: Iterable[SlotChange],
    first: Iterable[SlotChange],
    later: Iterable[SlotChange],
    most: int,
) -> list[MoveBatch]:
    """Batches of at most `most` loads on a device; the first one also empties slots.

    Args:
        emptied: slots to empty, whatever they get later.
        first, later: slots to fill, in this order; `later` not in the batch that empties slots.
    """
    changes = collections.defaultdict[int, list[SlotChange]](list)
    changes[0] += (change._replace(layer=-1, expert=-1) for change in emptied)
    loads = collections.Counter[Device]()
    for begin, slots in ((0, first), (most if changes[0] else 0, later)):
        for change in slots:
            number = max(loads[change[:2]], begin)
            loads[change[:2]] = number + 1
            changes[number // most].append(change)
    return [MoveBatch(tuple(sorted(changes[n]))) for n in sorted(changes) if changes[n]]
