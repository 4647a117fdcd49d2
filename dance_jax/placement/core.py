"""Who holds which expert (Placement), and on which device and slot of a server (Layout)."""

from __future__ import annotations

import dataclasses
import io
import os
import zipfile
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dance_jax.config import UserError
from dance_jax.files import whole_file
from dance_jax.placement.cost import Cost
from dance_jax.placement.measures import Traffic, measure
from dance_jax.placement.spare import spare_slots

Routes = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Which expert of which layer is resident on which servers."""

    #: bool [servers, MoE layers, experts].
    resident: np.ndarray
    #: The greatest `local_share`, of the counts that it was made from, that any placement in the
    #: same slots with as many holders can have; None if it is not known.
    upper_bound: float | None = None

    def __post_init__(self):
        resident = np.array(self.resident)
        if resident.ndim != 3 or resident.dtype != np.bool_:
            raise UserError(
                f"placement: {resident.dtype} {resident.shape}; "
                "bool [servers, layers, experts] is needed"
            )
        resident.flags.writeable = False
        object.__setattr__(self, "resident", resident)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placement) and np.array_equal(self.resident, other.resident)

    @property
    def num_servers(self) -> int:
        return self.resident.shape[0]

    @classmethod
    def of_lists(cls, resident: Sequence[Sequence[Sequence[int]]], experts: int) -> Placement:
        """Makes a placement from the ids of the experts that each server holds.

        Args:
            resident: [servers][layers], ids in any order.
            experts: number of experts of a layer.

        Raises:
            UserError: an id is not that of an expert, or is listed twice for a server.
        """
        found = np.zeros((len(resident), len(resident[0]), experts), bool)
        for server, held in enumerate(resident):
            for layer, ids in enumerate(held):
                if wrong := [expert for expert in ids if not 0 <= expert < experts]:
                    raise UserError(
                        f"placement: there is no expert {wrong[0]} in MoE layer {layer}, which "
                        f"has {experts}"
                    )
                if len(set(ids)) < len(ids):
                    twice = next(expert for expert in ids if ids.count(expert) > 1)
                    raise UserError(
                        f"placement: expert {twice} of MoE layer {layer} is listed twice for one "
                        "server; list it once"
                    )
                found[server, layer, list(ids)] = True
        return cls(found)

    def lists(self) -> list[list[list[int]]]:
        """The ids of the experts that each server holds, [servers][layers], ascending."""
        return [
            [np.flatnonzero(held_e).tolist() for held_e in held_le] for held_le in self.resident
        ]

    def validate(
        self,
        capacities: Sequence[int] | np.ndarray | None = None,
        names: Sequence[str] | None = None,
        holders: int = 1,
    ) -> None:
        """Checks that every expert is on enough servers and, if given, that all are within memory.

        Args:
            capacities: int [servers], expert slots.
            names: of the servers, for messages; None: their numbers.
            holders: servers that must hold each expert.

        Raises:
            UserError: an expert is on too few servers, or a server holds more than its slots.
        """
        short = np.argwhere(self.short(holders))
        if len(short):
            layer, expert = short[0]
            where = "no server" if holders == 1 else f"fewer than {holders} servers"
            raise UserError(
                f"placement: {len(short)} experts are on {where}, "
                f"the first is expert {expert} of MoE layer {layer}"
            )
        if capacities is None:
            return
        if len(capacities) != self.num_servers:
            raise UserError(
                f"placement of {self.num_servers} servers, {len(capacities)} capacities given"
            )
        for n, (held, slots) in enumerate(
            zip(self.resident.sum((1, 2)), np.asarray(capacities), strict=True)
        ):
            if held > slots:
                name = n if names is None else names[n]
                raise UserError(f"placement: server {name} holds {held} experts in {slots} slots")

    def short(self, holders: int = 1) -> np.ndarray:
        """Experts that fewer than `holders` servers hold: bool [layers, experts]."""
        return self.resident.sum(0) < holders

    def local_shares(self, counts: np.ndarray) -> np.ndarray:
        """Predicted share of each server's expert calls that are served at home: float64 [servers].

        A server without counts is taken to use all experts equally.

        Args:
            counts: [servers, layers, experts], expert calls of the requests of each server.
        """
        counts = np.asarray(counts, np.float64)
        if counts.shape != self.resident.shape:
            raise UserError(f"counts {counts.shape} do not fit placement {self.resident.shape}")
        silent = counts.sum((1, 2), keepdims=True) == 0
        counts = np.where(silent, 1.0, counts)
        return (counts * self.resident).sum((1, 2)) / counts.sum((1, 2))

    def local_share(self, counts: np.ndarray) -> float:
        """Predicted share of all expert calls that are served at home."""
        shares = self.local_shares(counts)
        totals = np.asarray(counts, np.float64).sum((1, 2))
        return float(shares.mean() if totals.sum() == 0 else shares @ totals / totals.sum())

    def traffic(self, routes: Routes, order: np.ndarray | None = None) -> Traffic:
        """Where the expert calls of routes go; see `Traffic`.

        Args:
            routes: per server int [tokens, layers, k].
            order: int [servers, servers], see `visit.preferences`; None: all servers are equal.
        """
        self.validate()
        return measure(self.resident, routes, order)

    def layer_time(
        self,
        routes: Routes,
        cost: Cost,
        weights: Sequence[float] | np.ndarray | None = None,
    ) -> float:
        """Predicted seconds of a layer; see `Traffic.layer_time`."""
        return self.traffic(routes, cost.preferences()).layer_time(cost, weights)

    def moved(self, previous: Placement) -> int:
        """The number of experts that servers must load if `previous` is in force."""
        if previous.resident.shape != self.resident.shape:
            raise UserError(
                f"placements of shape {previous.resident.shape} and {self.resident.shape}"
            )
        return int((self.resident & ~previous.resident).sum())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an npz file with `resident` and, where known, `upper_bound`."""
        arrays = {"resident": self.resident}
        if self.upper_bound is not None:
            arrays["upper_bound"] = np.array(self.upper_bound)
        with whole_file(path) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Placement:
        """Reads what `save` wrote.

        Raises:
            UserError: the file cannot be read or holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                bound = float(file["upper_bound"]) if "upper_bound" in file else None
                return cls(file["resident"], bound)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not a readable placement file ({error})") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """The device and slot of each resident expert. Each server counts its devices from 0."""

    #: int32 [servers, layers, experts], local device of the expert, -1 if it is not resident.
    device_of: np.ndarray
    #: int32 [servers, layers, experts], slot on that device, -1 if it is not resident.
    slot_of: np.ndarray
    #: Devices of each server.
    devices: tuple[int, ...]
    #: Slots on each device of each server.
    slots_per_device: tuple[int, ...]
    #: Servers that hold each expert at least, by every placement in these slots.
    holders: int = 1

    @property
    def resident(self) -> np.ndarray:
        """As `Placement.resident`."""
        return self.device_of >= 0

    @property
    def spare(self) -> tuple[int, ...]:
        """Slots of each device of each server that a placement leaves empty; see `spare_slots`."""
        experts = self.device_of[0].size
        return spare_slots(self.slots_per_device, self.devices, experts, self.holders)

    @property
    def capacities(self) -> np.ndarray:
        """Experts that each server may hold, int64 [servers]: slots less spare ones."""
        return np.multiply(self.devices, np.subtract(self.slots_per_device, self.spare))

    def experts_of(self, server: int, device: int) -> np.ndarray:
        """What each slot of a device holds: int32 [slots, 2] of (layer, expert), -1 if empty."""
        table = np.full((self.slots_per_device[server], 2), -1, np.int32)
        layer_expert = np.argwhere(self.device_of[server] == device)
        table[self.slot_of[server][tuple(layer_expert.T)]] = layer_expert
        return table

    def same_experts(self, other: Layout, server: int) -> bool:
        """Whether a server has the same experts in the same slots in both layouts."""
        return bool(
            (self.device_of[server] == other.device_of[server]).all()
            and (self.slot_of[server] == other.slot_of[server]).all()
        )

    def with_seats(self, count: int) -> Layout:
        """This layout, with servers without slots up to `count`."""
        more = count - len(self.devices)
        pad = ((0, more), (0, 0), (0, 0))
        return dataclasses.replace(
            self,
            device_of=np.pad(self.device_of, pad, constant_values=-1),
            slot_of=np.pad(self.slot_of, pad, constant_values=-1),
            devices=(*self.devices, *(1,) * more),
            slots_per_device=(*self.slots_per_device, *(0,) * more),
        )

    def of(self, servers: Sequence[int]) -> Layout:
        """The layout of some of the servers, in this order."""
        chosen = [*servers]
        return dataclasses.replace(
            self,
            device_of=self.device_of[chosen],
            slot_of=self.slot_of[chosen],
            devices=tuple(self.devices[n] for n in chosen),
            slots_per_device=tuple(self.slots_per_device[n] for n in chosen),
        )

    def reseated(self, server: int, devices: int, slots: int) -> Layout:
        """This layout, with another server in the place of one; it holds no experts."""
        device_of, slot_of = self.device_of.copy(), self.slot_of.copy()
        device_of[server] = slot_of[server] = -1
        all_devices, all_slots = [*self.devices], [*self.slots_per_device]
        all_devices[server], all_slots[server] = devices, slots
        return dataclasses.replace(
            self,
            device_of=device_of,
            slot_of=slot_of,
            devices=tuple(all_devices),
            slots_per_device=tuple(all_slots),
        )

    def with_server(self, server: int, other: Layout) -> Layout:
        """This layout, with a server's experts where `other` has them."""
        device_of, slot_of = self.device_of.copy(), self.slot_of.copy()
        device_of[server], slot_of[server] = other.device_of[server], other.slot_of[server]
        return dataclasses.replace(self, device_of=device_of, slot_of=slot_of)

    def to_bytes(self) -> bytes:
        """The layout for another process: the content of an npz file."""
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **dataclasses.asdict(self))
        return file.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> Layout:
        """Reads what `to_bytes` wrote."""
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return Layout(
                device_of=file["device_of"],
                slot_of=file["slot_of"],
                devices=tuple(file["devices"].tolist()),
                slots_per_device=tuple(file["slots_per_device"].tolist()),
                # Version 0.1.0 as first saved had no such number.
                holders=int(file["holders"]) if "holders" in file else 1,
            )


def _expected_calls(resident_nle: np.ndarray, counts_nle: np.ndarray) -> np.ndarray:
    """Expert calls that each server is expected to run: float64 [n, l, e].

    These are its own, and an equal share of the calls of servers that lack the expert.
    """
    away_le = (counts_nle * ~resident_nle).sum(0)
    holders_le = np.maximum(resident_nle.sum(0), 1)
    return np.where(resident_nle, counts_nle + (away_le / holders_le)[None], 0.0)


@jax.jit
def _spread(
    arriving_nle: jax.Array, calls_nle: jax.Array, load_nld: jax.Array, free_nd: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The algorithm of `spread`.

    Args:
        arriving_nle: bool, experts that need a device.
        calls_nle: float32, expected calls of each expert on each server.
        load_nld: float32, calls of the experts that are on the devices already.
        free_nd: int32, slots of each device for arriving experts; 0 where there is no device.

    Returns:
        device_nle, and number_nle, which numbers the arriving experts of each device from 0 in
        order of layers; int32 both, -1 where no expert arrives.
    """
    experts = arriving_nle.shape[2]
    max_devices = free_nd.shape[1]

    def one_server(arriving_le, calls_le, load_ld, free_d):
        order_le = jnp.argsort(jnp.where(arriving_le, -calls_le, jnp.float32(jnp.inf)), stable=True)
        arriving_l = arriving_le.sum(axis=1, dtype=jnp.int32)
        later_l = arriving_l.sum(dtype=jnp.int32) - jnp.cumsum(arriving_l, dtype=jnp.int32)
        free = jnp.maximum(free_d.sum(dtype=jnp.int32), 1)

        def one_layer(filled_d, layer):
            arriving_e, calls_e, order_e, load_d, later = layer
            # Later layers keep their share of every device's slots.
            limit_d = free_d - later * free_d // free

            def one_expert(i, state):
                filled_d, load_d, device_e, number_e = state
                e = order_e[i]
                open_d = filled_d < limit_d
                lightest = jnp.where(open_d, load_d, jnp.float32(jnp.inf)).min()
                best_d = open_d & (load_d <= lightest)
                d = jnp.argmax(jnp.where(best_d, free_d - filled_d, jnp.int32(-1)))
                d = d.astype(jnp.int32)
                device_e, number_e = device_e.at[e].set(d), number_e.at[e].set(filled_d[d])
                return filled_d.at[d].add(1), load_d.at[d].add(calls_e[e]), device_e, number_e

            absent_e = jnp.full(experts, -1, jnp.int32)
            arriving = arriving_e.sum(dtype=jnp.int32)
            start = (filled_d, load_d, absent_e, absent_e)
            filled_d, _, device_e, number_e = lax.fori_loop(0, arriving, one_expert, start)
            return filled_d, (device_e, number_e)

        empty_d = jnp.zeros(max_devices, jnp.int32)
        per_layer = (arriving_le, calls_le, order_le, load_ld, later_l)
        return lax.scan(one_layer, empty_d, per_layer)[1]

    def next_server(_, server):
        return None, one_server(*server)

    return lax.scan(next_server, None, (arriving_nle, calls_nle, load_nld, free_nd))[1]


def spread(
    placement: Placement,
    devices: Sequence[int],
    slots_per_device: Sequence[int],
    counts: np.ndarray | None = None,
    previous: Layout | None = None,
    spare: Sequence[int] | int = 0,
    holders: int = 1,
) -> Layout:
    """Spreads the experts of every server over its devices; see `device_slots` and `Layout`.

    Raises:
        UserError: as `device_slots`.
    """
    device_of, slot_of = device_slots(placement, devices, slots_per_device, counts, previous, spare)
    return Layout(
        device_of,
        slot_of,
        tuple(int(d) for d in devices),
        tuple(int(s) for s in slots_per_device),
        holders,
    )


def device_slots(
    placement: Placement,
    devices: Sequence[int] | np.ndarray,
    slots_per_device: Sequence[int] | np.ndarray,
    counts: np.ndarray | None = None,
    previous: Layout | None = None,
    spare: Sequence[int] | np.ndarray | int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """The device and slot of every resident expert, on any number of servers.

    A layer waits for its busiest device, so every layer is balanced on its own: its experts, most
    called first, each go to the device with the fewest calls of this layer that has room for one
    and still leaves later layers their share of its slots. Ties go to the device with most free
    slots, then to the lowest number. Slots are filled from 0 in order of layers.

    With `previous`, experts that stay on a server keep device and slot, and their calls count on
    their devices. Arriving experts are balanced around them. They take the slots that are empty in
    `previous`, in order, and only then those of departing experts. The result is the final state;
    `migration.batches` decides which slots are used on the way.

    Args:
        placement: covers all experts; a server's experts fit into devices x (slots - spare).
        devices: int [servers], devices of each server, at least 1.
        slots_per_device: int [servers], expert slots of each device of a server.
        counts: [servers, layers, experts] expert calls of each server's requests; None: equal.
        previous: the layout in force, of the same devices and slots.
        spare: int [servers] or one int for all, slots of each device that arriving experts
            leave empty.

    Returns:
        `Layout.device_of` and `Layout.slot_of`.

    Raises:
        UserError: a server has no device, or holds more experts than slots; counts or `previous`
            are of other shapes.
    """
    num_servers = placement.num_servers
    devices_n, slots_n = np.asarray(devices, np.int32), np.asarray(slots_per_device, np.int32)
    if devices_n.shape != (num_servers,) or slots_n.shape != (num_servers,):
        raise UserError(f"spread: devices and slots of {num_servers} servers are needed")
    if (devices_n < 1).any() or (slots_n < 0).any():
        raise UserError("spread: every server needs a device, and slots are not negative")
    usable_n = slots_n - np.asarray(spare, np.int32)
    placement.validate(devices_n * usable_n)
    calls_nle = _balanced_calls(placement.resident, counts)
    empty = _empty_layout(placement.resident.shape, devices_n, slots_n)
    before = empty if previous is None else previous
    if (before.devices, before.slots_per_device, before.device_of.shape) != (
        empty.devices,
        empty.slots_per_device,
        empty.device_of.shape,
    ):
        raise UserError("spread: the previous layout is of other servers, devices or slots")
    stays_nle = placement.resident & (before.device_of >= 0)
    arrives_nle = placement.resident & ~stays_nle
    on_device_nled = stays_nle[..., None] & (
        before.device_of[..., None] == np.arange(devices_n.max())
    )
    exists_nd = np.arange(devices_n.max()) < devices_n[:, None]
    free_nd = np.where(exists_nd, usable_n[:, None] - on_device_nled.sum((1, 2)), 0)
    device_of, number_of = _spread(
        jnp.asarray(arrives_nle),
        jnp.asarray(calls_nle, jnp.float32),
        jnp.asarray((on_device_nled * calls_nle[..., None]).sum(2), jnp.float32),
        jnp.asarray(np.maximum(free_nd, 0), jnp.int32),
    )
    arrival_slots = _arrival_slots(np.asarray(device_of), np.asarray(number_of), stays_nle, before)
    return (
        np.where(stays_nle, before.device_of, device_of),
        np.where(stays_nle, before.slot_of, arrival_slots),
    )


def _arrival_slots(
    device_nle: np.ndarray, number_nle: np.ndarray, stays_nle: np.ndarray, before: Layout
) -> np.ndarray:
    """Slots of arriving experts: int32 [n, l, e], -1 for all others.

    Args:
        device_nle, number_nle: as `_spread` returns them.
        stays_nle: bool, experts that keep device and slot.
        before: the layout in force.
    """
    slot_nle = np.full_like(number_nle, -1)
    for server, devices in enumerate(before.devices):
        for device in range(devices):
            layer, expert = before.experts_of(server, device).T
            empty = layer < 0
            left = ~empty & ~stays_nle[server, layer, expert]
            free = np.concatenate([np.flatnonzero(empty), np.flatnonzero(left)])
            here = device_nle[server] == device
            slot_nle[server][here] = free[number_nle[server][here]]
    return slot_nle


def _balanced_calls(resident_nle: np.ndarray, counts: np.ndarray | None) -> np.ndarray:
    """The expert calls that `spread` balances: float64 [n, l, e]; raises UserError as it does."""
    shape = resident_nle.shape
    counts_nle = np.ones(shape) if counts is None else np.asarray(counts, np.float64)
    if counts_nle.shape != shape:
        raise UserError(f"spread: counts {counts_nle.shape} do not fit placement {shape}")
    if not np.isfinite(counts_nle).all() or (counts_nle < 0).any():
        raise UserError("spread: counts are negative or not finite")
    # A server without calls in a layer is taken to use all its experts equally.
    silent_nl1 = counts_nle.sum(2, keepdims=True) == 0
    return _expected_calls(resident_nle, np.where(silent_nl1, 1.0, counts_nle))


def _empty_layout(shape: tuple[int, ...], devices_n: np.ndarray, slots_n: np.ndarray) -> Layout:
    nowhere = np.full(shape, -1, np.int32)
    return Layout(
        nowhere,
        nowhere,
        tuple(int(d) for d in devices_n),
        tuple(int(s) for s in slots_n),
    )
