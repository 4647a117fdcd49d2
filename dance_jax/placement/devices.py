"""Spread the experts of every server over its devices and their slots."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dance_jax.config import UserError
from dance_jax.placement.core import Layout, Placement


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
