"""The placement problem as a policy receives it, checked once for all policies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dance_jax.config import UserError
from dance_jax.placement.core import Placement
from dance_jax.placement.cost import CallCost, Cost


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Checked inputs of a policy; built by `Problem.checked`."""

    #: float64 [servers, layers, experts]: expert calls of the requests that arrive at each server.
    counts: np.ndarray
    #: int64 [servers]: expert slots, at most the number of experts of all layers.
    capacities: np.ndarray
    #: Servers that must hold each expert, at least 1.
    holders: int
    #: Per server int [tokens, layers, k]; None if routes are not known.
    routes: tuple[np.ndarray, ...] | None
    #: int64 [servers]: devices of each server.
    devices: np.ndarray
    #: The cost of a layer in the exchange in use; None if routes are not known either.
    cost: Cost | None
    #: The placement in force, for policies that keep churn low; None if there is none.
    previous: Placement | None
    #: Seed for policies that draw at random, an int32 of at least 0.
    seed: int

    @classmethod
    def checked(
        cls,
        counts: np.ndarray,
        capacities: Sequence[int] | np.ndarray,
        *,
        holders: int = 1,
        routes: Sequence[np.ndarray] | None,
        devices: Sequence[int] | np.ndarray | None,
        cost: Cost | None,
        previous: Placement | None,
        seed: int,
    ) -> Problem:
        """Checks shapes, ranges, and that there are slots for `holders` copies of all experts.

        Raises:
            UserError: an input has a wrong shape, is negative or not finite, or slots are missing.
        """
        counts = np.asarray(counts)
        if counts.ndim != 3 or 0 in counts.shape or counts.dtype.kind not in "iuf":
            raise UserError(
                f"counts: {counts.dtype} {counts.shape}; "
                "numbers [servers, layers, experts] are needed"
            )
        counts = counts.astype(np.float64)
        if not np.isfinite(counts).all() or (counts < 0).any():
            raise UserError("counts: every number must be finite and at least 0")
        num_servers, layers, experts = counts.shape
        checked_routes = _checked_routes(routes, num_servers, layers, experts)
        checked_devices, checked_cost = _checked_cost(devices, cost, num_servers, checked_routes)
        return cls(
            counts,
            _checked_capacities(capacities, num_servers, layers * experts, holders),
            holders,
            checked_routes,
            checked_devices,
            checked_cost,
            _checked_previous(previous, counts.shape),
            seed % 2**31,
        )

    @property
    def token_weights(self) -> np.ndarray:
        """Tokens of each server per token of the mean server, from counts: float64 [servers]."""
        totals_n = self.counts.sum((1, 2))
        return totals_n / totals_n.mean() if totals_n.any() else np.ones(len(totals_n))


def _per_server(what: str, values: Sequence[int] | np.ndarray, num: int, least: int) -> np.ndarray:
    """Checks one whole number per server, each at least `least`: int64 [servers]."""
    array = np.asarray(values)
    if array.shape != (num,) or array.dtype.kind not in "iu":
        raise UserError(f"{what}: {num} whole numbers are needed, one per server; got {values}")
    if (array < least).any():
        raise UserError(f"{what}: every number must be at least {least}; got {values}")
    return array.astype(np.int64)


def _checked_capacities(
    capacities: Sequence[int] | np.ndarray, num_servers: int, total: int, holders: int
) -> np.ndarray:
    # A server holds an expert once, so it has no use for more slots than there are experts.
    capacities_n = np.minimum(_per_server("capacities", capacities, num_servers, 0), total)
    if not 1 <= holders <= num_servers:
        raise UserError(f"holders: from 1 to {num_servers}, the number of servers; got {holders}")
    missing = holders * total - int(capacities_n.sum())
    if missing > 0:
        times = f" that {holders} servers each must hold" if holders > 1 else ""
        raise UserError(
            f"too little memory: the model has {total} experts{times} and the servers have "
            f"{holders * total - missing} slots, {missing} slots are missing; "
            "give servers more memory or add one"
        )
    return capacities_n


def _checked_routes(
    routes: Sequence[np.ndarray] | None, num_servers: int, layers: int, experts: int
) -> tuple[np.ndarray, ...] | None:
    if routes is None:
        return None
    if len(routes) != num_servers:
        raise UserError(f"routes: {len(routes)} arrays for {num_servers} servers")
    checked = tuple(np.asarray(route) for route in routes)
    for n, route in enumerate(checked):
        if route.ndim != 3 or route.shape[1] != layers or route.dtype.kind not in "iu":
            raise UserError(
                f"routes of server {n}: {route.dtype} {route.shape}; "
                f"integers [tokens, {layers} layers, k] are needed"
            )
        if route.size and (route.min() < 0 or route.max() >= experts):
            raise UserError(f"routes of server {n}: expert numbers are 0..{experts - 1}")
    if len({route.shape[2] for route in checked}) > 1 or checked[0].shape[2] < 1:
        chosen = ", ".join(str(route.shape[2]) for route in checked)
        raise UserError(f"routes: tokens of the servers choose {chosen} experts; one k is needed")
    return checked


def _checked_cost(
    devices: Sequence[int] | np.ndarray | None,
    cost: Cost | None,
    num_servers: int,
    routes: tuple[np.ndarray, ...] | None,
) -> tuple[np.ndarray, Cost | None]:
    """Devices and cost; devices default to those of the cost, or else to one each."""
    if cost is not None and cost.servers != num_servers:
        raise UserError(f"cost: of {cost.servers} servers, but counts of {num_servers}")
    if devices is None:
        devices = [1] * num_servers if cost is None else cost.devices
    devices_n = _per_server("devices", devices, num_servers, 1)
    if cost is not None and (cost.devices != devices_n).any():
        raise UserError(f"cost: devices {cost.devices}, but {devices_n} are given")
    if cost is None and routes is not None:
        cost = CallCost.reference(devices_n, routes[0].shape[2])
    return devices_n, cost


def _checked_previous(previous: Placement | None, shape: tuple[int, ...]) -> Placement | None:
    if previous is not None and previous.resident.shape != shape:
        raise UserError(f"previous: placement {previous.resident.shape} for counts {shape}")
    return previous
