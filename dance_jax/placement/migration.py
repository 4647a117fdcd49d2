"""Moves experts from one layout to another in small batches, and decides whether that pays."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dance_jax.placement.core import Layout, Placement, Routes
from dance_jax.placement.cost import Cost

#: The share of the present cost that a migration must gain.
HYSTERESIS = 0.05
#: The gain must also exceed this many of its standard errors: there is a decision every few
#: minutes, and chance must never move experts.
ERRORS = 3.0
#: Number of parts of routes that `halves` deals out in turn.
PARTS = 16
#: (server, local device), and (layer, expert).
Device = tuple[int, int]
Expert = tuple[int, int]


class NoEmptySlot(ValueError):
    """A device without an empty slot would have to receive an expert."""

    def __init__(self, server: int, device: int) -> None:
        super().__init__(server, device)
        self.server, self.device = server, device

    def __str__(self) -> str:
        return f"server {self.server}, device {self.device}: no slot is empty to load an expert"


class SlotChange(NamedTuple):
    """The new content of a slot."""

    server: int
    #: Local device of the server.
    device: int
    slot: int
    #: The expert to load; both are -1 if the slot becomes empty.
    layer: int
    expert: int

    @property
    def loads(self) -> bool:
        """Whether an expert is read; otherwise the slot is only emptied."""
        return self.layer >= 0


@dataclasses.dataclass(frozen=True)
class MoveBatch:
    """Slots that change together: the layout after it is used once all servers have loaded."""

    changes: tuple[SlotChange, ...]

    def loads(self, server: int | None = None) -> tuple[SlotChange, ...]:
        """The changes that read an expert, of one server or of all servers."""
        return tuple(c for c in self.changes if c.loads and server in (None, c.server))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a new placement pays, and why; of plain types, to be sent to other processes."""

    migrate: bool
    #: In words, for logs and users.
    reason: str
    #: Expected seconds of communication and expert calls in the coming interval, with the present
    #: placement and with the new one.
    present_seconds: float
    expected_seconds: float
    migration_seconds: float
    #: Experts that servers must load.
    experts_moved: int

    @property
    def gain(self) -> float:
        """The share of the present cost that is saved, without the cost of the migration."""
        if self.present_seconds == 0:
            return 0.0
        return 1.0 - self.expected_seconds / self.present_seconds


def changed(layout: Layout, changes: Iterable[SlotChange]) -> Layout:
    """The layout with new content in some slots; the old content of these slots is gone.

    Raises:
        ValueError: a slot does not exist or changes twice; or afterwards an expert is twice on a
            server, or on no server.
    """
    tables, seen = _tables(layout), set()
    for change in changes:
        server, device, slot, layer, expert = change
        table = tables.get((server, device), np.empty((0, 2), np.int32))
        _, layers, experts = layout.device_of.shape
        if not (
            0 <= slot < len(table)
            and layer < layers
            and expert < experts
            and (layer >= 0) == (expert >= 0)
        ):
            raise ValueError(f"{change}: no such slot or expert")
        if change[:3] in seen:
            raise ValueError(f"{change}: the slot changes twice")
        seen.add(change[:3])
        table[slot] = layer, expert
    return _with_tables(layout, tables)


def target(layout: Layout, steps: Iterable[MoveBatch]) -> Layout:
    """The layout once all batches are applied, one after the other."""
    tables = _tables(layout)
    for batch in steps:
        for server, device, slot, layer, expert in batch.changes:
            tables[server, device][slot] = layer, expert
    return _with_tables(layout, tables)


def difference(old: Layout, new: Layout) -> list[SlotChange]:
    """The slots whose content differs, with their content in `new`."""
    tables = _tables(old), _tables(new)
    return [
        SlotChange(*device, slot, *tables[1][device][slot].tolist())
        for device in tables[0]
        for slot in np.flatnonzero((tables[0][device] != tables[1][device]).any(1)).tolist()
    ]


def batches(old: Layout, new: Layout, most: int) -> list[tuple[MoveBatch, Layout]]:
    """Batches from one layout to another, each with the layout after it.

    A batch loads experts into slots that are empty before it, at most `most` on a device. It
    empties slots of experts that `new` does not have there as soon as enough other copies remain:
    no expert has fewer holders than `Layout.holders` asks for, or than in `old` or `new` if these
    are fewer. So everything that is used before or after a batch is in place once all servers have
    loaded. The last layout has every expert on the device that `new` says; the slots of arriving
    experts are chosen here, and other experts keep theirs.

    A device fills its last empty slot only in a batch that empties another of its slots, or with
    its last expert if `new` leaves no slot empty. So there always is a next batch: if all devices
    that lack experts have one empty slot left, each has experts to give up, because `new` needs no
    more slots. These have no more holders than they need, so other such devices lack them: `new`
    has at least as many. Followed from device to device they form a circle, in which each loads one
    and gives up another.

    Equal arguments give equal batches.

    Raises:
        NoEmptySlot: a device lacks an expert and has no empty slot.
        ValueError: the layouts differ in servers, slots or experts; or `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"{most} loads per batch: at least 1 is needed")
    if (old.devices, old.slots_per_device, old.device_of.shape) != (
        new.devices,
        new.slots_per_device,
        new.device_of.shape,
    ):
        raise ValueError("layouts of different servers, slots or experts")
    plan, sequence, layout = _Plan(old, new), [], old
    while changes := plan.next_batch(most):
        layout = changed(layout, changes)
        sequence.append((MoveBatch(changes), layout))
    return sequence


def halves(routes: Routes) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Splits each server's tokens by alternating parts: routes to fit to, and routes to judge by.

    A new placement looks better than it is on the very tokens that it was fitted to, while the one
    in force was fitted to others. That would now and then cause a migration although nothing
    changed. Tokens of one request choose similar experts. If they are neighbours
    (`RouteSample.kept`), neighbouring parts belong to different requests, except at their ends. A
    server's only token is in both halves.
    """
    parts = [np.array_split(route, PARTS) for route in routes]
    fit = [np.concatenate(each[::2]) for each in parts]
    judge = [
        np.concatenate(each[1::2]) if len(route) > 1 else route
        for route, each in zip(routes, parts, strict=True)
    ]
    return fit, judge


def seconds_per_token(
    placement: Placement,
    routes: Routes,
    cost: Cost,
    weights: Sequence[float] | np.ndarray | None = None,
) -> float:
    """Predicted seconds of all layers per token of the mean server; see `Placement.layer_time`.

    0 if no server has a token.
    """
    if not any(map(len, routes)):
        return 0.0
    return placement.layer_time(routes, cost, weights) * placement.resident.shape[1]


def gain_error(
    old: Placement,
    new: Placement,
    routes: Routes,
    cost: Cost,
    weights: Sequence[float] | np.ndarray | None = None,
    parts: int = 8,
) -> float:
    """The standard error of the gain `1 - new seconds / old seconds`, measured on routes.

    It comes from the spread over parts of the routes, on each of which both placements are
    measured; parts are neighbours, see `halves`. Add ERRORS times it to the hysteresis: a few
    requests tell the gain of a placement only to some per cent, which would move experts of a
    stable workload.

    Returns:
        A share of the present cost; infinite if there are too few routes.
    """
    if all(len(route) < parts for route in routes):
        return float("inf")
    gains = []
    for some in zip(*(np.array_split(route, parts) for route in routes), strict=True):
        before = old.layer_time(some, cost, weights)
        gains.append(1.0 - new.layer_time(some, cost, weights) / before if before > 0 else 0.0)
    return float(np.std(gains, ddof=1) / np.sqrt(parts))


def migration_seconds(
    batches: Iterable[MoveBatch], expert_bytes: float, read_rate: Sequence[float] | np.ndarray
) -> float:
    """Seconds that loading takes: servers read at the same time, and a batch waits for the slowest.

    DanceMoE's T_mig is the sum over all servers; here it is compared with seconds that all servers
    spend at the same time.

    Args:
        batches: as `batches` returns them, without layouts.
        expert_bytes: bytes of one expert.
        read_rate: float [servers], bytes a second that each server loads.
    """
    rate_n = np.asarray(read_rate, np.float64)
    if (rate_n <= 0).any():
        raise ValueError(f"read rates must be above 0; got {read_rate}")
    seconds = 0.0
    for batch in batches:
        loads_n = np.bincount([c.server for c in batch.loads()], minlength=len(rate_n))
        seconds += float((loads_n * expert_bytes / rate_n).max())
    return seconds


def worth(
    old_seconds_per_token: float,
    new_seconds_per_token: float,
    tokens_expected: float,
    migration_seconds: float,
    hysteresis: float = HYSTERESIS,
) -> bool:
    """Whether migrating costs less than staying (arXiv:2508.12851, section on migration).

    That is C(new) + T_mig < C(old), where C is the cost of the coming interval. Besides, the gain
    C(old) - C(new) must be above `hysteresis` x C(old), so that noise moves nothing.
    """
    old, new = old_seconds_per_token * tokens_expected, new_seconds_per_token * tokens_expected
    return new + migration_seconds < old and old - new > hysteresis * old


def decide(
    old_seconds_per_token: float,
    new_seconds_per_token: float,
    tokens_expected: float,
    migration_seconds: float,
    experts_moved: int,
    force: bool = False,
    hysteresis: float = HYSTERESIS,
) -> Verdict:
    """Decides by `worth`, and gives the reason.

    Args:
        old_seconds_per_token, new_seconds_per_token: as `seconds_per_token` returns them, on the
            same routes, which should not be those that the new placement was fitted to (`halves`).
        tokens_expected: tokens of the mean server in the coming interval.
        migration_seconds: as `migration_seconds` returns them.
        experts_moved: as `Placement.moved` returns them; if 0 there is nothing to do.
        force: migrate whatever it costs.
        hysteresis: the least gain, as a share of the present cost: HYSTERESIS + ERRORS x
            `gain_error`, which may be infinite.
    """
    old, new = old_seconds_per_token * tokens_expected, new_seconds_per_token * tokens_expected
    pays = worth(
        old_seconds_per_token,
        new_seconds_per_token,
        tokens_expected,
        migration_seconds,
        hysteresis,
    )
    if experts_moved == 0:
        reason = "the placement in force is the best that was found"
    elif pays:
        reason = "it pays"
    elif not np.isfinite(hysteresis):
        reason = "too few tokens have been seen to judge"
    elif old - new <= hysteresis * old:
        reason = f"the gain is not above {hysteresis:.0%} of the present cost"
    else:
        reason = "the migration costs more than it gains in the coming interval"
    if force and experts_moved > 0 and not pays:
        reason = f"forced, although {reason}"
    return Verdict(
        migrate=experts_moved > 0 and (pays or force),
        reason=reason,
        present_seconds=old,
        expected_seconds=new,
        migration_seconds=migration_seconds,
        experts_moved=experts_moved,
    )


def _tables(layout: Layout) -> dict[Device, np.ndarray]:
    """`Layout.experts_of` of every device."""
    return {
        (server, device): layout.experts_of(server, device)
        for server, devices in enumerate(layout.devices)
        for device in range(devices)
    }


def _with_tables(layout: Layout, tables: Mapping[Device, np.ndarray]) -> Layout:
    """A layout of the same slots with other contents; raises ValueError as `changed` does."""
    device_of, slot_of = np.full_like(layout.device_of, -1), np.full_like(layout.slot_of, -1)
    for (server, device), table in tables.items():
        (slots,) = np.nonzero(table[:, 0] >= 0)
        layer, expert = table[slots].T
        device_of[server, layer, expert], slot_of[server, layer, expert] = device, slots
    resident = device_of >= 0
    if resident.sum() != sum((table[:, 0] >= 0).sum() for table in tables.values()):
        raise ValueError("an expert is twice on a server")
    if not resident.any(0).all():
        layer, expert = np.argwhere(~resident.any(0))[0]
        raise ValueError(f"expert {expert} of MoE layer {layer} is nowhere")
    return dataclasses.replace(layout, device_of=device_of, slot_of=slot_of)


def _slots(layout: Layout) -> dict[Device, dict[Expert, int]]:
    """The slot of each expert, by device."""
    return {
        device: {
            (layer, expert): slot
            for slot, (layer, expert) in enumerate(table.tolist())
            if layer >= 0
        }
        for device, table in _tables(layout).items()
    }


class _Plan:
    """The content of slots while batches are made, and the experts still to come and to go."""

    def __init__(self, old: Layout, new: Layout) -> None:
        self._slots, target = _slots(old), _slots(new)
        self._size = {device: old.slots_per_device[device[0]] for device in self._slots}
        self._coming = {d: sorted(target[d].keys() - held) for d, held in self._slots.items()}
        self._going = {d: held.keys() - target[d] for d, held in self._slots.items()}
        #: Copies that each expert keeps on the way.
        wanted = min(old.holders, new.holders)
        self._keeps = np.minimum(wanted, np.minimum(old.resident.sum(0), new.resident.sum(0)))
        #: Devices that end without an empty slot.
        self._full = {device for device, held in target.items() if len(held) == self._size[device]}
        self._holders: dict[Expert, set[Device]] = {}
        for device, held in self._slots.items():
            for expert in held:
                self._holders.setdefault(expert, set()).add(device)
        for device, experts in self._coming.items():
            if experts and self._empty(device) == 0:
                raise NoEmptySlot(*device)
        #: For the present batch: the empty slots that it may fill, and its changes.
        self._room: dict[Device, list[int]] = {}
        self._changes: list[SlotChange] = []

    def next_batch(self, most: int) -> tuple[SlotChange, ...]:
        """The changes of the next batch; none if all experts are in place."""
        self._changes = []
        self._room = {
            device: sorted(set(range(self._size[device])) - set(held.values()))[:most]
            for device, held in self._slots.items()
        }
        for expert in sorted(set().union(*self._going.values())):
            self._release(expert)
        while ready := [device for device in self._waiting() if self._has_spare(device)]:
            device = min(ready, key=lambda each: (-len(self._coming[each]), each))
            self._load(device, min(self._coming[device], key=self._preference))
        # All other devices would fill their last slot.
        while circle := _shortest_circle(self._exchanges()):
            for device, expert, source in circle:
                self._load(device, expert, source)
        return tuple(sorted(self._changes))

    def _empty(self, device: Device) -> int:
        return self._size[device] - len(self._slots[device])

    def _waiting(self) -> list[Device]:
        """Devices that lack experts and may load one in this batch."""
        return [device for device, lacks in self._coming.items() if lacks and self._room[device]]

    def _has_spare(self, device: Device) -> bool:
        """Whether a device may fill an empty slot without giving up an expert."""
        is_last = len(self._coming[device]) == 1 and device in self._full
        return self._empty(device) > (0 if is_last else 1)

    def _preference(self, expert: Expert) -> tuple[int, Expert]:
        """Sort key: first the experts that free a slot on the device that lacks most."""
        needs = [len(self._coming[each]) - self._empty(each) for each in self._leaving(expert)]
        return -max(needs, default=0), expert

    def _leaving(self, expert: Expert) -> list[Device]:
        """Devices of which one gives up the expert once another has it."""
        return [device for device in self._holders[expert] if expert in self._going[device]]

    def _exchanges(self) -> dict[Device, dict[Device, Expert]]:
        """Experts that a waiting device can give to another: by the giving, then the taking one."""
        waiting = self._waiting()
        exchanges: dict[Device, dict[Device, Expert]] = {device: {} for device in waiting}
        for device in waiting:
            for expert in self._coming[device]:
                leaving = self._leaving(expert)
                siblings = [source for source in leaving if source[0] == device[0]]
                for source in siblings or leaving:
                    if source in exchanges:
                        exchanges[source].setdefault(device, expert)
        return exchanges

    def _load(self, device: Device, expert: Expert, source: Device | None = None) -> None:
        """Load an expert, and release it elsewhere: first on its own server, then on `source`."""
        slot = self._room[device].pop(0)
        self._coming[device].remove(expert)
        self._slots[device][expert] = slot
        self._holders[expert].add(device)
        self._changes.append(SlotChange(*device, slot, *expert))
        # A server holds an expert once.
        self._release(expert, (device[0], source))

    def _release(self, expert: Expert, first: tuple[int, Device | None] | None = None) -> None:
        """Empties slots that the expert has to leave, as long as enough copies remain."""
        going = self._leaving(expert)
        # If copies must wait, then those on the devices that need slots least.
        going.sort(key=lambda device: (-len(self._coming[device]), device))
        if first is not None:
            going.sort(key=lambda device: (device[0] != first[0], device != first[1]))
        for device in going[: len(self._holders[expert]) - self._keeps[expert]]:
            self._going[device].remove(expert)
            self._holders[expert].remove(device)
            slot = self._slots[device].pop(expert)
            self._changes.append(SlotChange(*device, slot, -1, -1))


def _shortest_circle(
    exchanges: Mapping[Device, Mapping[Device, Expert]],
) -> list[tuple[Device, Expert, Device]]:
    """A circle of devices, each of which takes an expert from the next; empty if there is none."""
    circles = (_circle_through(start, exchanges) for start in exchanges)
    return min(filter(None, circles), key=len, default=[])


def _circle_through(
    start: Device, exchanges: Mapping[Device, Mapping[Device, Expert]]
) -> list[tuple[Device, Expert, Device]]:
    """The shortest circle through a device, by breadth-first search; empty if there is none."""
    came_from: dict[Device, Device] = {}
    queue = deque([start])
    while queue:
        source = queue.popleft()
        for device in exchanges[source]:
            if device not in came_from:
                came_from[device] = source
                queue.append(device)
        if start in came_from:
            break
    else:
        return []
    way, circle = start, []
    while not circle or way != start:
        source = came_from[way]
        circle.append((way, exchanges[source][way], source))
        way = source
    return circle
