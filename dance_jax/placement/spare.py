"""How many slots stay empty, so that experts can move."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: A device keeps one spare slot for so many slots, one at least and MOST_SPARE at most. More of
#: them make a migration's batches fewer, and leave room for fewer experts.
SLOTS_PER_SPARE, MOST_SPARE = 16, 4


def reserve(slots: int) -> int:
    """Slots of a device that stay empty, unless experts need them; see `spare_slots`."""
    return min(max(1, slots // SLOTS_PER_SPARE), MOST_SPARE)


def spare_slots(
    slots_per_device: Sequence[int], devices: Sequence[int], experts: int
) -> tuple[int, ...]:
    """Slots that a placement leaves empty on each device of each server.

    Batches of a migration load into empty slots alone (`migration.batches`). A server that has room
    for all experts keeps only slots that it does not need for them. Where servers together would
    not hold all experts any more, the largest reserves shrink first, to 0 if need be: such a server
    cannot receive an expert.

    Args:
        slots_per_device, devices: int [servers].
        experts: of all layers.
    """
    slots_n, devices_n = np.asarray(slots_per_device), np.asarray(devices)
    unneeded_n = slots_n - -(-experts // devices_n)
    limit_n = np.where(unneeded_n >= 0, unneeded_n, np.maximum(slots_n - 1, 0))
    spare_n = np.minimum([reserve(slots) for slots in slots_per_device], limit_n)
    while spare_n.any() and ((slots_n - spare_n) * devices_n).sum() < experts:
        spare_n[spare_n.argmax()] -= 1
    return tuple(spare_n.tolist())
