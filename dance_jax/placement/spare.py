"""How many slots stay empty, so that experts can move."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: A device keeps one spare slot for every SLOTS_PER_SPARE slots, at least one and at most
#: MOST_SPARE. More spare slots mean fewer batches in a migration, but room for fewer experts.
SLOTS_PER_SPARE, MOST_SPARE = 16, 4


def reserve(slots: int) -> int:
    """The spare slots of a device, unless experts need them; see `spare_slots`."""
    return min(max(1, slots // SLOTS_PER_SPARE), MOST_SPARE)


def spare_slots(
    slots_per_device: Sequence[int], devices: Sequence[int], experts: int, holders: int = 1
) -> tuple[int, ...]:
    """The slots that a placement leaves empty on each device of each server.

    Batches of a migration only load into empty slots (`migration.batches`). A server with room for
    all experts only spares slots that it does not need for them. If all servers together could not
    hold all experts `holders` times, the largest reserves shrink first, to 0 if necessary; a server
    without spare slots cannot receive experts.

    Args:
        slots_per_device, devices: int [servers].
        experts: number of experts of all layers.
        holders: servers that must hold each expert.
    """
    slots_n, devices_n = np.asarray(slots_per_device), np.asarray(devices)
    unneeded_n = slots_n - -(-experts // devices_n)
    limit_n = np.where(unneeded_n >= 0, unneeded_n, np.maximum(slots_n - 1, 0))
    spare_n = np.minimum([reserve(slots) for slots in slots_per_device], limit_n)

    def usable_n() -> np.ndarray:
        return np.minimum((slots_n - spare_n) * devices_n, experts)

    while usable_n().sum() < holders * experts:
        reserve_n = np.where(usable_n() < experts, spare_n, 0)
        if not reserve_n.any():
            break
        spare_n[reserve_n.argmax()] -= 1
    return tuple(spare_n.tolist())
