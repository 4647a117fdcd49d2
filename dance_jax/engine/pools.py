"""The expert slots of one server's devices: in the C++ library's memory, or as JAX's arrays."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.engine.compile_cache import CompileCache
from dance_jax.engine.shards import Shards
from dance_jax.models import native
from dance_jax.models.experts import ExpertFormat, Pool, Weights
from dance_jax.models.kernels_cpu import NativePool
from dance_jax.models.topology import Topology


class SlotWrite(NamedTuple):
    """What a slot of a device is to hold."""

    slot: int
    #: Its number in the model: layer * experts of a layer + expert.
    expert: int
    weights: Weights


class Pools(Protocol):
    """The pools of this process's devices."""

    @property
    def argument(self) -> Any:
        """What steps get, over the devices: a `Pool` of each."""
        ...

    @property
    def bytes(self) -> list[int]:
        """Bytes of each device's pool."""
        ...

    def warm_up(self) -> None:
        """Compiles what the others call."""
        ...

    def fill(self, device: int, experts: Iterable[SlotWrite]) -> None:
        """Puts experts into slots of a device, before the first step."""
        ...

    def write(self, writes: Sequence[Sequence[SlotWrite]]) -> None:
        """Puts experts into slots of each device."""
        ...

    def read(self, device: int, slot: int) -> Weights:
        """What a slot of a device holds, as host arrays; `write` must not run."""
        ...


def make_pools(
    form: ExpertFormat,
    slots: int,
    shards: Shards,
    compile_cache: CompileCache,
    topology: Topology,
) -> Pools:
    """Empty pools of so many slots on each device."""
    if native.usable():
        return NativePools(form, slots, shards)
    return ArrayPools(form, slots, shards, compile_cache, topology)


class NativePools:
    """In the C++ library's memory; slots may be written while steps run."""

    def __init__(self, form: ExpertFormat, slots: int, shards: Shards) -> None:
        self._form = form
        forms = (form.gate, form.up, form.down)
        #: Of each device.
        self.devices = [
            NativePool(form.d, form.f, form.activation, forms, form.bias, slots)
            for _ in shards.devices
        ]
        self.argument = shards.per_device([np.int32(pool.number) for pool in self.devices])

    @property
    def bytes(self) -> list[int]:
        return [pool.bytes for pool in self.devices]

    def warm_up(self) -> None:
        pass

    def fill(self, device: int, experts: Iterable[SlotWrite]) -> None:
        for slot, expert, weights in experts:
            self.devices[device].put(slot, expert, weights)

    def write(self, writes: Sequence[Sequence[SlotWrite]]) -> None:
        for device, own in enumerate(writes):
            self.fill(device, own)

    def read(self, device: int, slot: int) -> Weights:
        found = self._form.empty()
        self.devices[device].get(slot, found)
        return found


class ArrayPools:
    """As arrays on the devices, which a write donates; no step may be under way then."""

    def __init__(
        self,
        form: ExpertFormat,
        slots: int,
        shards: Shards,
        compile_cache: CompileCache,
        topology: Topology,
    ) -> None:
        self._form, self._shards = form, shards
        self._compile_cache, self._key = compile_cache, topology
        #: Until all of them are filled, on the host.
        self._filling: list[Weights] | None = [form.empty(slots) for _ in shards.devices]
        self._arrays: Pool = ()
        #: What writes a slot, and what reads one, once compiled.
        self._write_slot: Any = None
        self._read_slot: Any = None

    @property
    def argument(self) -> Any:
        if self._filling is not None:
            self._arrays = self._stack(self._filling)
            self._filling = None
        return self._arrays

    @property
    def bytes(self) -> list[int]:
        sizes = dict.fromkeys(self._shards.devices, 0)
        for leaf in self.argument:
            for shard in leaf.addressable_shards:
                sizes[shard.device] += shard.data.nbytes
        return list(sizes.values())

    def fill(self, device: int, experts: Iterable[SlotWrite]) -> None:
        assert self._filling is not None
        for slot, _, weights in experts:
            for array, leaf in zip(self._filling[device], weights, strict=True):
                array[slot] = leaf

    def _stack(self, pools: Sequence[Weights]) -> tuple[Array, ...]:
        return tuple(self._shards.per_device(leaves) for leaves in zip(*pools, strict=True))

    @functools.cached_property
    def _no_expert(self) -> Weights:
        """Weights for a device that writes nothing."""
        return self._form.empty()

    def warm_up(self) -> None:
        """The first write copies what of the pool is still numpy's memory; later ones nothing."""
        if self._write_slot is not None or self.argument[0].shape[1] == 0:
            return
        compile_ = self._compile_cache.compile
        self._write_slot = compile_(("write slot", self._key), self.lower_write)
        self._read_slot = compile_(("read slot", self._key), self._lower_read)
        self._write_one([None] * len(self._shards.devices))
        self.read(0, 0)

    def lower_write(self) -> jax.stages.Lowered:
        """`write_slot` on every device, traced for this process."""
        nothing = self._pack([None] * len(self._shards.devices))
        each = jax.jit(self._shards.on_each(write_slot), donate_argnums=0)
        return each.lower(self.argument, *nothing)

    def _lower_read(self) -> jax.stages.Lowered:
        slot = self._shards.per_device([np.int32(0)] * len(self._shards.devices))
        return jax.jit(self._shards.on_each(read_slot)).lower(self.argument, slot)

    def write(self, writes: Sequence[Sequence[SlotWrite]]) -> None:
        self.warm_up()
        for number in range(max(map(len, writes), default=0)):
            self._write_one([own[number] if number < len(own) else None for own in writes])

    def _write_one(self, writes: list[SlotWrite | None]) -> None:
        self._arrays = self._write_slot(self.argument, *self._pack(writes))

    def _pack(self, writes: list[SlotWrite | None]) -> tuple[Array, tuple[Array, ...]]:
        """The arguments of `write_slot`: a slot of each device, or none."""
        slot = [np.int32(-1 if write is None else write.slot) for write in writes]
        fresh = [self._no_expert if write is None else write.weights for write in writes]
        return self._shards.per_device(slot), self._stack(fresh)

    def read(self, device: int, slot: int) -> Weights:
        self.warm_up()
        slot_d = np.zeros(len(self._shards.devices), np.int32)
        slot_d[device] = slot
        found = self._read_slot(self.argument, self._shards.per_device(list(slot_d)))
        return tuple(self._shards.local(leaf)[device] for leaf in found)


@jax.named_scope("write_slot")
def write_slot(pool: tuple[Array, ...], slot: Array, fresh: tuple[Array, ...]):
    """Puts an expert into a slot of one device, in place where the pool is donated.

    Args:
        slot: int32 []; -1 writes nothing.
        fresh: the expert's weights.
    """

    def put(_: Array, pool: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(
            lax.dynamic_update_index_in_dim(old, new, slot, 0)
            for old, new in zip(pool, fresh, strict=True)
        )

    return lax.fori_loop(0, (slot >= 0).astype(jnp.int32), put, pool)


def read_slot(pool: tuple[Array, ...], slot: Array) -> tuple[Array, ...]:
    """The weights in slot `slot`, int32 [], of one device."""
    return tuple(lax.dynamic_index_in_dim(leaf, slot, keepdims=False) for leaf in pool)
