"""Staging of batches of moved experts until all servers have loaded them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from dance_jax.engine.pools import SlotWrite
from dance_jax.models.experts import ExpertFormat, Weights
from dance_jax.placement.core import Layout

#: (local device, slot) -> weights.
Experts = Mapping[tuple[int, int], Weights]


@dataclasses.dataclass(frozen=True)
class StagedBatch:
    """A layout, and the slots that a server writes for it."""

    number: int
    layout: Layout
    #: Slots to write, per local device.
    writes: list[list[SlotWrite]]


def new_slots(old: Layout, new: Layout, rank: int) -> set[tuple[int, int]]:
    """The slots (local device, slot) of a server that get another expert under `new`."""
    found = set()
    for device in range(new.devices[rank]):
        was, now = old.experts_of(rank, device), new.experts_of(rank, device)
        changed = (now != was).any(1) & (now[:, 0] >= 0)
        found |= {(device, slot) for slot in np.flatnonzero(changed).tolist()}
    return found


class Staging:
    """One server's staged batches, in order. Staging holds host arrays and uses no device.

    Args:
        layout: the layout in force.
        rank: this server's rank.
        form: the format of the pool.
    """

    def __init__(self, layout: Layout, rank: int, form: ExpertFormat) -> None:
        #: The layout in force.
        self.layout = layout
        self._rank = rank
        self._leaf_types = [(leaf.shape, leaf.dtype) for leaf in form.leaves.values()]
        self._batches: list[StagedBatch] = []
        #: Number of the last batch that was staged.
        self.last = 0
        self._announced = self._commit = 0

    @property
    def ready(self) -> int:
        """Number of the next batch, which is loaded here; 0 for none."""
        return self._batches[0].number if self._batches else 0

    @property
    def latest(self) -> Layout:
        """The layout after the last staged batch, on which the next batch builds."""
        return self._batches[-1].layout if self._batches else self.layout

    @property
    def news(self) -> bool:
        """Whether the other servers have yet to be told that the next batch may be applied."""
        return self._committed not in (0, self._announced)

    @property
    def _committed(self) -> int:
        return self.ready if self.ready <= self._commit else 0

    def reseat(self, number: int, rank: int, devices: int, slots: int) -> Layout:
        """Put another server in the place of one, as a batch of this number.

        Returns:
            The layout in force from now on.

        Raises:
            ValueError: a batch is staged.
        """
        if self._batches:
            raise ValueError(f"batch {self.ready} is staged: no server can join or leave")
        self.last = number
        self.layout = self.layout.reseated(rank, devices, slots)
        return self.layout

    def commit(self, number: int) -> None:
        """Note that all servers have loaded the batches up to this one."""
        self._commit = number

    def add(self, number: int, layout: Layout, experts: Experts) -> StagedBatch:
        """Hold a batch; see `Engine.stage`."""
        before = self.latest
        if number <= self.last:
            raise ValueError(f"batch {number} after batch {self.last}: numbers must increase")
        same = (layout.devices, layout.slots_per_device, layout.device_of.shape) == (
            before.devices,
            before.slots_per_device,
            before.device_of.shape,
        )
        if not same:
            raise ValueError(f"batch {number}: the layout is for other servers or another model")
        needed = new_slots(before, layout, self._rank)
        if missing := sorted(needed - set(experts)):
            raise ValueError(
                f"batch {number}: no weights for (device, slot) {missing[0]} and "
                f"{len(missing) - 1} more slots that the layout changes"
            )
        writes = [[] for _ in range(layout.devices[self._rank])]
        tables = [layout.experts_of(self._rank, device) for device in range(len(writes))]
        for (device, slot), weights in sorted(experts.items(), key=lambda item: item[0]):
            self._check(number, tables, device, slot, weights)
            layer, expert = tables[device][slot].tolist()
            which = layer * layout.device_of.shape[2] + expert
            writes[device].append(SlotWrite(slot, which, weights))
        batch = StagedBatch(number, layout, writes)
        self._batches.append(batch)
        self.last = number
        return batch

    def _check(
        self, number: int, tables: list[np.ndarray], device: int, slot: int, weights: Weights
    ) -> None:
        at = f"batch {number}, device {device}, slot {slot}"
        if not (0 <= device < len(tables) and 0 <= slot < len(tables[device])):
            raise ValueError(f"{at}: the slot does not exist")
        if tables[device][slot, 0] < 0:
            raise ValueError(f"{at}: the layout has no expert there")
        found = [(array.shape, array.dtype) for array in weights]
        if found != self._leaf_types:
            raise ValueError(
                f"{at}: weights have shapes and dtypes {found}, not {self._leaf_types}"
            )

    def drop(self, number: int) -> bool:
        """Drop a batch and all later ones; see `Engine.unstage`."""
        kept = [batch for batch in self._batches if batch.number < number]
        dropped = any(batch.number == number for batch in self._batches)
        self._batches = kept
        return dropped

    def tell(self) -> int:
        """The batch that this server tells the others, in the next step, may be applied; or 0."""
        self._announced = self._committed
        return self._announced

    def take(self, number: int) -> StagedBatch:
        """Remove the next batch and put its layout in force.

        Args:
            number: the batch that all servers agreed on.
        """
        batch = self._batches.pop(0)
        if batch.number != number:
            raise RuntimeError(f"all servers agree on batch {number}, here {batch.number} is next")
        self.layout = batch.layout
        return batch
