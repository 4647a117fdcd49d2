"""Devices of all servers, and collectives between the devices of one server."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from dance_jax.models import native, siblings_cpu

#: Mesh axis over all devices of all servers, in rank order.
AXIS = "device"
#: Rows of a message if the number of messages depends on a count.
CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Topology:
    """The cluster as known to one process at compile time."""

    #: This server's position in the hosts file.
    rank: int
    #: Number of devices of each server.
    devices: tuple[int, ...]
    #: Most tokens of one device of any server in a step.
    max_step_tokens: int

    @property
    def num_servers(self) -> int:
        return len(self.devices)

    @property
    def siblings(self) -> int:
        """Number of devices of this server."""
        return self.devices[self.rank]

    @property
    def peers(self) -> tuple[int, ...]:
        return tuple(n for n in range(self.num_servers) if n != self.rank)

    def gateway(self, server: int) -> int:
        """Mesh position of a server's first device."""
        return sum(self.devices[:server])

    def max_rows(self, server: int) -> int:
        """Most rows that `server` can send to another server in one layer."""
        return self.devices[server] * self.max_step_tokens

    @property
    def room(self) -> int:
        """Most rows that all peers can send in one layer, rounded up to whole CHUNKs."""
        return -(-sum(self.max_rows(peer) for peer in self.peers) // CHUNK) * CHUNK


def _ring(topology: Topology, shift: int) -> list[tuple[int, int]]:
    base, size = topology.gateway(topology.rank), topology.siblings
    return [(base + i, base + (i + shift) % size) for i in range(size)]


def local_index(topology: Topology) -> Array:
    """int32 []: index of this device within its server; 0 is the gateway."""
    return lax.axis_index(AXIS) - topology.gateway(topology.rank)


def gather_siblings(topology: Topology, x_td: Array) -> Array:
    """Gather [t, w] of every device into [devices * t, w], in device order, on every device."""
    size = topology.siblings
    if size == 1:
        return x_td
    if native.usable():
        return siblings_cpu.gather(local_index(topology), size, x_td)
    me, t = local_index(topology), x_td.shape[0]
    out = jnp.zeros((size * t, x_td.shape[1]), x_td.dtype)
    out = lax.dynamic_update_slice(out, x_td, (me * t, 0))
    for shift in range(1, size):
        got = lax.ppermute(x_td, AXIS, _ring(topology, shift))
        out = lax.dynamic_update_slice(out, got, ((me - shift) % size * t, 0))
    return out


def scatter_siblings(topology: Topology, y_gd: Array) -> Array:
    """Sum [devices * t, d] over devices; each device keeps its own [t, d] of the sum."""
    size = topology.siblings
    if size == 1:
        return y_gd
    me, t = local_index(topology), y_gd.shape[0] // size
    if native.usable():
        first = (me * t).astype(jnp.int32)
        return siblings_cpu.sum_rows(me, size, y_gd, first, jnp.int32(t), t)
    total = lax.dynamic_slice_in_dim(y_gd, me * t, t)
    for shift in range(1, size):
        part = lax.dynamic_slice_in_dim(y_gd, (me + shift) % size * t, t)
        total += lax.ppermute(part, AXIS, _ring(topology, shift))
    return total


def sum_at_gateway(topology: Topology, y_rd: Array, count: Array) -> Array:
    """Sum the first `count` rows over the devices; the result is valid on the gateway."""
    base = topology.gateway(topology.rank)

    def add(i, y_rd):
        part = lax.dynamic_slice(y_rd, (i * CHUNK, 0), (CHUNK, y_rd.shape[1]))
        total = part
        for sibling in range(1, topology.siblings):
            total += lax.ppermute(part, AXIS, [(base + sibling, base)])
        return lax.dynamic_update_slice(y_rd, total, (i * CHUNK, 0))

    if topology.siblings == 1:
        return y_rd
    if native.usable():
        me = local_index(topology)
        mine = jnp.where(me == 0, count, 0).astype(jnp.int32)
        return siblings_cpu.sum_rows(me, topology.siblings, y_rd, jnp.int32(0), mine, y_rd.shape[0])
    return lax.fori_loop(0, (count + CHUNK - 1) // CHUNK, add, y_rd)


def from_gateway(topology: Topology, tree):
    """Copy the gateway's arrays to every device of the server."""
    if topology.siblings == 1:
        return tree
    base = topology.gateway(topology.rank)

    def copy(x):
        out = jnp.where(local_index(topology) == 0, x, jnp.zeros_like(x))
        for i in range(1, topology.siblings):
            got = lax.ppermute(x, AXIS, [(base, base + i)])
            out = jnp.where(local_index(topology) == i, got, out)
        return out

    return jax.tree.map(copy, tree)
