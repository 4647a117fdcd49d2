"""From one layout to another in small batches, and whether that pays."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dance_jax.placement.core import Layout, Placement, Routes
from dance_jax.placement.cost import Cost
from dance_jax.placement.metrics import holders_mask

#: Share of the present cost that a migration must gain.
HYSTERESIS = 0.05
#: Standard errors of that gain that it must exceed besides. There is a decision every few minutes,
#: and in none of them may chance move experts.
ERRORS = 3.0
#: Parts that `halves` deals out in turn.
PARTS = 16


class SlotChange(NamedTuple):
    """New content of a slot."""

    server: int
    #: Local device of the server.
    device: int
    slot: int
    #: The expert to load; -1 both: the tables name nothing there any more.
    layer: int
    expert: int

    @property
    def loads(self) -> bool:
        """An expert has to be read, in contrast to a slot that is only emptied."""
        return self.layer >= 0


@dataclasses.dataclass(frozen=True)
class Batch:
    """Slots of all servers that change between the same two steps."""

    changes: tuple[SlotChange, ...]

    def loads(self, server: int | None = None) -> tuple[SlotChange, ...]:
        """Changes that read an expert, of one server or of all."""
        return tuple(c for c in self.changes if c.loads and server in (None, c.server))


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether a new placement pays, and why; plain types, to cross processes."""

    migrate: bool
    #: In words, for logs and users.
    reason: str
    #: Expected seconds of communication and expert calls over the coming interval, as things are
    #: and with the new placement.
    present_seconds: float
    expected_seconds: float
    migration_seconds: float
    #: Experts that servers must load.
    experts_moved: int

    @property
    def gain(self) -> float:
        """Share of the present cost that is saved, the migration itself left out."""
        if self.present_seconds == 0:
            return 0.0
        return 1.0 - self.expected_seconds / self.present_seconds


def changed(layout: Layout, changes: Iterable[SlotChange]) -> Layout:
    """The layout with other content in some slots.

    What a slot held is gone from there, also where it is not written anywhere else.

    Raises:
        ValueError: a slot does not exist or changes twice; an expert is then twice on a server,
            or nowhere.
    """
    contents, base = _contents(layout), _first_positions(layout)
    experts, seen = layout.holders.shape[1], set()
    for change in changes:
        server, device, slot, layer, expert = change
        exists = (
            0 <= server < len(layout.devices)
            and 0 <= device < layout.devices[server]
            and 0 <= slot < layout.slots_per_device[server]
            and layer < layout.holders.shape[0]
            and expert < experts
            and (layer >= 0) == (expert >= 0)
        )
        if not exists:
            raise ValueError(f"{change}: no such slot or expert")
        if change[:3] in seen:
            raise ValueError(f"{change}: the slot changes twice")
        seen.add(change[:3])
        position = base[server] + device * layout.slots_per_device[server] + slot
        contents[position] = layer * experts + expert if layer >= 0 else -1
    return _with_contents(layout, contents)


def batches(old: Layout, new: Layout, most: int) -> list[tuple[Batch, Layout]]:
    """Steps from one layout to another, each with the layout after it; the last one is `new`.

    After every batch all experts are somewhere. A batch loads at most `most` experts on a server,
    except where the only copies of experts take each other's slots in a circle that needs more.
    Slots that are only emptied keep their content until the last batch, or until the expert gets
    another slot on the same server. Equal arguments give equal batches.

    Raises:
        ValueError: the layouts are not of the same servers, slots and experts; `most` is below 1.
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
    while True:
        before = plan.contents.copy()
        plan.next_batch(most)
        if not plan.pending:
            plan.contents[:] = plan.target
        positions = np.flatnonzero(plan.contents != before).tolist()
        if not positions:
            return sequence
        batch = Batch(tuple(plan.change(position) for position in positions))
        layout = changed(layout, batch.changes)
        sequence.append((batch, layout))


def halves(routes: Routes) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Every other part of each server's tokens: routes to place on, and routes to judge by.

    A new placement looks better than it is on the very tokens that it was fitted to, while the one
    in force was fitted to others: enough to migrate, once in a while, although nothing changed.
    Tokens of one request choose alike; where they are neighbours (`RouteSample.kept`), parts of
    neighbours are of different requests, but for those at their ends. A server's only token is in
    both.
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

    0 where no server has a token.
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
    """Standard error of the gain `1 - new seconds / old seconds` measured on routes.

    From its spread over parts of the routes, on each of which both placements are measured; parts
    are of neighbours, see `halves`. ERRORS times it belong on top of the hysteresis: a few requests
    say no more about a placement than some per cent, and would else move experts of a stable
    workload.

    Returns:
        A share of the present cost; infinite where routes are too few for parts.
    """
    if all(len(route) < parts for route in routes):
        return float("inf")
    gains = []
    for some in zip(*(np.array_split(route, parts) for route in routes), strict=True):
        before = old.layer_time(some, cost, weights)
        gains.append(1.0 - new.layer_time(some, cost, weights) / before if before > 0 else 0.0)
    return float(np.std(gains, ddof=1) / np.sqrt(parts))


def migration_seconds(
    batches: Iterable[Batch], expert_bytes: float, read_rate: Sequence[float] | np.ndarray
) -> float:
    """How long loading takes: servers read at the same time, a batch waits for the slowest.

    DanceMoE's T_mig is the sum over all servers; what is compared here are seconds that all
    servers spend together.

    Args:
        batches: of `batches`.
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

    C(new) + T_mig < C(old) with C the cost over the coming interval, and besides a gain
    C(old) - C(new) above `hysteresis` x C(old), so that noise moves nothing.
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
) -> Decision:
    """`worth` in words.

    Args:
        old_seconds_per_token, new_seconds_per_token: of `seconds_per_token`, on the same
            routes, which should not be those that the new placement was fitted to (`halves`).
        tokens_expected: tokens of the mean server in the coming interval.
        migration_seconds: of `migration_seconds`.
        experts_moved: `Placement.moved`; without any there is nothing to do.
        force: migrate whatever it costs.
        hysteresis: least gain, as a share of the present cost; HYSTERESIS + ERRORS x `gain_error`,
            which may be infinite.
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
    return Decision(
        migrate=experts_moved > 0 and (pays or force),
        reason=reason,
        present_seconds=old,
        expected_seconds=new,
        migration_seconds=migration_seconds,
        experts_moved=experts_moved,
    )


def _first_positions(layout: Layout) -> np.ndarray:
    """Slots of all servers are numbered through; int64 [servers]: where each server begins."""
    slots_n = np.multiply(layout.devices, layout.slots_per_device)
    return np.cumsum(slots_n) - slots_n


def _contents(layout: Layout) -> np.ndarray:
    """Per position layer x experts + expert, -1 where empty: int64 [positions]."""
    total = int(np.multiply(layout.devices, layout.slots_per_device).sum())
    contents = np.full(total, -1, np.int64)
    server, layer, expert = np.nonzero(layout.device_of >= 0)
    slots_n = np.asarray(layout.slots_per_device)
    position = (
        _first_positions(layout)[server]
        + layout.device_of[server, layer, expert] * slots_n[server]
        + layout.slot_of[server, layer, expert]
    )
    contents[position] = layer * layout.holders.shape[1] + expert
    return contents


def _where(layout: Layout) -> np.ndarray:
    """(server, device, slot) of every position, int64 [positions, 3]."""
    sizes = zip(layout.devices, layout.slots_per_device, strict=True)
    return np.array(
        [
            (server, device, slot)
            for server, (devices, slots) in enumerate(sizes)
            for device in range(devices)
            for slot in range(slots)
        ],
        np.int64,
    ).reshape(-1, 3)


def _with_contents(layout: Layout, contents: np.ndarray) -> Layout:
    """A layout of the same slots with other contents; see `changed` for what is raised."""
    where = _where(layout)
    filled = np.flatnonzero(contents >= 0)
    server = where[filled, 0]
    layer, expert = np.divmod(contents[filled], layout.holders.shape[1])
    device_of, slot_of = np.full_like(layout.device_of, -1), np.full_like(layout.slot_of, -1)
    device_of[server, layer, expert] = where[filled, 1]
    slot_of[server, layer, expert] = where[filled, 2]
    resident = device_of >= 0
    if int(resident.sum()) != len(filled):
        raise ValueError("an expert is twice on a server")
    if not resident.any(0).all():
        layer, expert = np.argwhere(~resident.any(0))[0]
        raise ValueError(f"expert {expert} of MoE layer {layer} is nowhere")
    return dataclasses.replace(
        layout, holders=holders_mask(resident), device_of=device_of, slot_of=slot_of
    )


class _Plan:
    """What lies where while batches are made, and what is still to be loaded."""

    def __init__(self, old: Layout, new: Layout):
        self.contents, self.target = _contents(old), _contents(new)
        self._where = _where(old)
        self._server = self._where[:, 0].tolist()
        self._experts = old.holders.shape[1]
        total = old.holders.size
        self._copies = np.bincount(self.contents[self.contents >= 0], minlength=total)
        #: [servers, experts of all layers]: position of the expert on the server, -1: not there.
        self._place = np.full((len(old.devices), total), -1, np.int64)
        filled = np.flatnonzero(self.contents >= 0)
        self._place[self._where[filled, 0], self.contents[filled]] = filled
        #: Positions that wait for their expert, and those that wait for each expert.
        self.pending = dict.fromkeys(
            np.flatnonzero((self.target >= 0) & (self.target != self.contents)).tolist()
        )
        self._loads: dict[int, list[int]] = {}
        for position in self.pending:
            self._loads.setdefault(int(self.target[position]), []).append(position)

    def change(self, position: int) -> SlotChange:
        server, device, slot = self._where[position].tolist()
        content = int(self.contents[position])
        layer, expert = divmod(content, self._experts) if content >= 0 else (-1, -1)
        return SlotChange(server, device, slot, layer, expert)

    def next_batch(self, most: int) -> None:
        """Loads what may be loaded next."""
        room_n = [most] * len(self._place)
        waiting = len(self.pending)
        # What one chain loads may be what another waits for.
        while self._load_chains(room_n):
            pass
        if self.pending and len(self.pending) == waiting:
            self._load(self._shortest_circle(), room_n)

    def _load_chains(self, room_n: list[int]) -> bool:
        """Whether any could be loaded."""
        any_loaded = False
        for position in self._urgent():
            chain = self._chain(position, room_n) if position in self.pending else None
            if chain is not None:
                self._load(chain, room_n)
                any_loaded = True
        return any_loaded

    def _shortest_circle(self) -> list[int]:
        """Where nothing is safe, what waits for what must close somewhere."""
        best: list[int] = []
        known: set[int] = set()
        for position in self.pending:
            circle = None if position in known else self._chain(position, None)
            if circle is not None:
                known.update(circle)
                best = circle if not best or len(circle) < len(best) else best
        return best

    def _urgent(self) -> list[int]:
        """Positions that wait, those of servers with the most of them first."""
        waiting_n = np.bincount(
            [self._server[p] for p in self.pending], minlength=len(self._place)
        ).tolist()
        return sorted(self.pending, key=lambda p: (-waiting_n[self._server[p]], p))

    def _safe(self, position: int) -> bool:
        """Nothing that lies there is lost when it is overwritten."""
        content = int(self.contents[position])
        return content < 0 or int(self._copies[content]) > 1

    def _chain(self, start: int, room_n: list[int] | None) -> list[int] | None:
        """The shortest way to load a position: what it overwrites is loaded elsewhere, and so on.

        It ends where nothing is lost, or in a circle back to the start. None: there is none, or
        servers have no room for it (None: no matter how much). Each position overwrites one expert,
        and any position that waits for that one can follow, so this is a search in a graph.
        """
        if room_n is not None and room_n[self._server[start]] < 1:
            return None
        longest = len(self.pending) if room_n is None else sum(room_n)
        came_from: dict[int, int] = {}
        queue = deque([(start, 1)])
        while queue:
            position, length = queue.popleft()
            if self._safe(position):
                return self._way(start, position, came_from, room_n)
            for heir in self._loads[int(self.contents[position])]:
                if heir == start:
                    return self._way(start, position, came_from, room_n)
                has_room = room_n is None or room_n[self._server[heir]] > 0
                if has_room and length < longest and heir not in came_from:
                    came_from[heir] = position
                    queue.append((heir, length + 1))
        return None

    def _way(
        self, start: int, end: int, came_from: dict[int, int], room_n: list[int] | None
    ) -> list[int] | None:
        way = [end]
        while way[-1] != start:
            way.append(came_from[way[-1]])
        if room_n is not None:
            servers = [self._server[position] for position in way]
            if any(servers.count(server) > room_n[server] for server in set(servers)):
                return None
        return way

    def _load(self, chain: list[int], room_n: list[int]) -> None:
        """Overwrites all positions of a chain at once."""
        for position in chain:
            self._empty(position)
        for position in chain:
            server, expert = self._server[position], int(self.target[position])
            # The same server may have had it in another slot.
            self._empty(int(self._place[server, expert]))
            self.contents[position] = expert
            self._copies[expert] += 1
            self._place[server, expert] = position
            room_n[server] -= 1
            del self.pending[position]
            self._loads[expert].remove(position)

    def _empty(self, position: int) -> None:
        content = int(self.contents[position]) if position >= 0 else -1
        if content < 0:
            return
        self.contents[position] = -1
        self._copies[content] -= 1
        self._place[self._server[position], content] = -1
