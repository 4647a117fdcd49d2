"""Who holds which expert (Placement), and on which device and slot of a server (Layout).

Free of JAX, which front ends do not need.
"""

from __future__ import annotations

import dataclasses
import io
import os
import zipfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dance_jax.config import UserError
from dance_jax.files import whole_file
from dance_jax.placement.spare import spare_slots

if TYPE_CHECKING:
    from dance_jax.placement.cost import Cost
    from dance_jax.placement.measures import Traffic

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
        from dance_jax.placement.measures import measure

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
