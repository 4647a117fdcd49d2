"""The expert slots of one server's devices, in the C++ library's memory or as JAX arrays."""

from __future__ import annotations

import functools
import threading
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

#: Row counts for which `ArrayExperts` is compiled, in addition to the maximum.
ROWS = (4, 32, 128)


class SlotWrite(NamedTuple):
    """An expert to write to a slot of a device."""

    slot: int
    #: The expert's number in the model: layer * experts per layer + expert.
    expert: int
    weights: Weights


class Pools(Protocol):
    """The pools of this process's devices."""

    @property
    def argument(self) -> Any:
        """The argument of steps, sharded over the devices: a `Pool` for each."""
        ...

    @property
    def bytes(self) -> list[int]:
        """Bytes of each device's pool."""
        ...

    def warm_up(self) -> None:
        """Compile what `write` and `read` call."""
        ...

    def fill(self, device: int, experts: Iterable[SlotWrite]) -> None:
        """Put experts into slots of a device, before the first step."""
        ...

    def write(self, writes: Sequence[Sequence[SlotWrite]]) -> None:
        """Put experts into slots of each device."""
        ...

    def read(self, device: int, slot: int) -> Weights:
        """The expert in a slot of a device, as host arrays; must not run during a `write`."""
        ...


def make_pools(
    form: ExpertFormat,
    slots: int,
    shards: Shards,
    compile_cache: CompileCache,
    topology: Topology,
) -> Pools:
    """Create empty pools with `slots` slots on each device."""
    if native.usable():
        return NativePools(form, slots, shards)
    return ArrayPools(form, slots, shards, compile_cache, topology)


class NativePools:
    """Pools in the C++ library's memory; slots may be written while steps run."""

    def __init__(self, form: ExpertFormat, slots: int, shards: Shards) -> None:
        self._form = form
        forms = (form.gate, form.up, form.down)
        #: One pool per device.
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
    """Pools as arrays on the devices, which a write donates.

    A step that takes the arrays as an argument must not run during a write; `ArrayExperts` may.
    """

    def __init__(
        self,
        form: ExpertFormat,
        slots: int,
        shards: Shards,
        compile_cache: CompileCache,
        topology: Topology,
    ) -> None:
        self.form, self.shards = form, shards
        self._compile_cache, self._key = compile_cache, topology
        #: Per device: expert's number in the model -> slot, and slot -> expert's number.
        self._slot_of: list[dict[int, int]] = [{} for _ in shards.devices]
        self._expert_of: list[dict[int, int]] = [{} for _ in shards.devices]
        #: Held while the arrays and their tables change, and while a thread that is not otherwise
        #: protected from writes starts a program with the arrays.
        self.lock = threading.Lock()
        #: The pools on the host until all of them are filled; None afterwards.
        self._filling: list[Weights] | None = [form.empty(slots) for _ in shards.devices]
        self._arrays: Pool = ()
        #: The compiled functions that write and read a slot.
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
        sizes = dict.fromkeys(self.shards.devices, 0)
        for leaf in self.argument:
            for shard in leaf.addressable_shards:
                sizes[shard.device] += shard.data.nbytes
        return list(sizes.values())

    def fill(self, device: int, experts: Iterable[SlotWrite]) -> None:
        assert self._filling is not None
        for slot, expert, weights in experts:
            self._remember(device, slot, expert)
            for array, leaf in zip(self._filling[device], weights, strict=True):
                array[slot] = leaf

    def _remember(self, device: int, slot: int, expert: int) -> None:
        slots, experts = self._slot_of[device], self._expert_of[device]
        old = experts.get(slot)
        if old is not None and slots.get(old) == slot:
            del slots[old]
        slots[expert], experts[slot] = slot, expert

    def slots_of(self, experts: Sequence[int]) -> np.ndarray:
        """int32 [devices, n]: each expert's slot on each device, -1 if the device lacks the expert.

        The caller must hold `lock`.
        """
        found = [[slots.get(expert, -1) for expert in experts] for slots in self._slot_of]
        return np.array(found, np.int32).reshape(len(self._slot_of), len(experts))

    def _stack(self, pools: Sequence[Weights]) -> tuple[Array, ...]:
        return tuple(self.shards.per_device(leaves) for leaves in zip(*pools, strict=True))

    @functools.cached_property
    def _no_expert(self) -> Weights:
        """Placeholder weights for a device that writes nothing."""
        return self.form.empty()

    def warm_up(self) -> None:
        """Compile the write and read of a slot and run each once.

        The first write copies the part of the pool that is still in numpy's memory; later writes
        copy nothing.
        """
        if self._write_slot is not None or self.argument[0].shape[1] == 0:
            return
        compile_ = self._compile_cache.compile
        self._write_slot = compile_(("write slot", self._key), self.lower_write)
        self._read_slot = compile_(("read slot", self._key), self._lower_read)
        self._write_one([None] * len(self.shards.devices))
        self.read(0, 0)

    def lower_write(self) -> jax.stages.Lowered:
        """`write_slot` on every device, lowered for this process."""
        nothing = self._pack([None] * len(self.shards.devices))
        each = jax.jit(self.shards.on_each(write_slot), donate_argnums=0)
        return each.lower(self.argument, *nothing)

    def _lower_read(self) -> jax.stages.Lowered:
        slot = self.shards.per_device([np.int32(0)] * len(self.shards.devices))
        return jax.jit(self.shards.on_each(read_slot)).lower(self.argument, slot)

    def write(self, writes: Sequence[Sequence[SlotWrite]]) -> None:
        self.warm_up()
        for number in range(max(map(len, writes), default=0)):
            self._write_one([own[number] if number < len(own) else None for own in writes])

    def _write_one(self, writes: list[SlotWrite | None]) -> None:
        packed = self._pack(writes)
        with self.lock:
            self._arrays = self._write_slot(self.argument, *packed)
            for device, write in enumerate(writes):
                if write is not None:
                    self._remember(device, write.slot, write.expert)

    def _pack(self, writes: list[SlotWrite | None]) -> tuple[Array, tuple[Array, ...]]:
        """The arguments of `write_slot`: one slot per device, or none."""
        slot = [np.int32(-1 if write is None else write.slot) for write in writes]
        fresh = [self._no_expert if write is None else write.weights for write in writes]
        return self.shards.per_device(slot), self._stack(fresh)

    def read(self, device: int, slot: int) -> Weights:
        self.warm_up()
        slot_d = np.zeros(len(self.shards.devices), np.int32)
        slot_d[device] = slot
        with self.lock:
            found = self._read_slot(self.argument, self.shards.per_device(list(slot_d)))
        return tuple(self.shards.local(leaf)[device] for leaf in found)


class ArrayExperts:
    """Computes experts in `ArrayPools` for rows on the host, independent of the devices' steps.

    Each device computes the experts it holds, without collectives: two threads that start programs
    with collectives in different orders would deadlock.

    Args:
        pools: the pools that hold the experts.
        layers: number of layers with routed experts in the model.
        k: maximum number of experts of a row.
        most_rows: maximum number of rows computed at once.
        dtype: dtype of the rows on the devices.
    """

    def __init__(
        self, pools: ArrayPools, layers: int, k: int, most_rows: int, dtype: np.dtype
    ) -> None:
        self._pools, self._shards = pools, pools.shards
        self._layers, self._k, self._dtype = layers, k, dtype
        self._sizes = [size for size in ROWS if size < most_rows] + [most_rows]
        #: Number of rows -> compiled function.
        self._compiled: dict[int, jax.stages.Compiled] = {}

    def compile(self, compile_cache: CompileCache, key: object) -> None:
        """Compile for all row counts; must be called before the first call.

        Args:
            compile_cache: keeps the compiled functions.
            key: what the compiled code depends on besides the model.
        """
        for size in self._sizes:
            lower = functools.partial(self._lower, size)
            self._compiled[size] = compile_cache.compile(("experts", key, size), lower)

    def _lower(self, rows: int) -> jax.stages.Lowered:
        def experts(pool: Pool, x_nd: Array, slot_nk: Array, weight_nk: Array) -> Array:
            x_nd = x_nd.astype(self._dtype)
            return self._pools.form.ffn(pool, x_nd, slot_nk, weight_nk, self._layers)

        x_nd = np.zeros((rows, self._pools.form.d), np.float32)
        weight_nk = np.zeros((rows, self._k), np.float32)
        slot_dnk = np.full((len(self._shards.devices), rows, self._k), -1, np.int32)
        arguments = self._arguments(x_nd, slot_dnk, weight_nk)
        return jax.jit(self._shards.on_each(experts)).lower(self._pools.argument, *arguments)

    def _arguments(
        self, x_nd: np.ndarray, slot_dnk: np.ndarray, weight_nk: np.ndarray
    ) -> tuple[Array, Array, Array]:
        devices, per_device = len(slot_dnk), self._shards.per_device
        x_dnd, weight_dnk = per_device([x_nd] * devices), per_device([weight_nk] * devices)
        return x_dnd, per_device(list(slot_dnk)), weight_dnk

    def __call__(
        self, x_nd: np.ndarray, expert_nk: np.ndarray, weight_nk: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Weighted sums of the experts of rows; any thread may call this.

        Args:
            x_nd: float32 [n, d], hidden states.
            expert_nk: int [n, k], numbers as in `SlotWrite.expert`, or -1 for none; k may be less
                than the model's.
            weight_nk: float32 [n, k], the experts' weights.

        Returns:
            float32 [n, d], the sums; and bool [n, k], False if no device holds the expert.
        """
        n, k = expert_nk.shape
        size = next(size for size in self._sizes if size >= n)
        numbers, which_nk = np.unique(expert_nk, return_inverse=True)
        more = ((0, size - n), (0, self._k - k))
        x, weight = np.pad(x_nd, (more[0], (0, 0))), np.pad(weight_nk, more)
        with self._pools.lock:
            slot_dnk = self._pools.slots_of(numbers.tolist())[:, which_nk.reshape(n, k)]
            # If several devices hold an expert, the first one computes it.
            first_nk = (slot_dnk >= 0).argmax(0)
            devices = np.arange(len(slot_dnk))[:, None, None]
            own_dnk = np.where(devices == first_nk, slot_dnk, -1)
            own_dnk = np.pad(own_dnk, ((0, 0), *more), constant_values=-1)
            compiled = self._compiled[size]
            sums = compiled(self._pools.argument, *self._arguments(x, own_dnk, weight))
        here_nk = (slot_dnk >= 0).any(0) | (expert_nk < 0)
        return functools.reduce(np.add, self._shards.local(sums))[:n], here_nk


@jax.named_scope("write_slot")
def write_slot(pool: tuple[Array, ...], slot: Array, fresh: tuple[Array, ...]):
    """Put an expert into a slot of one device, in place if the pool is donated.

    Args:
        pool: the device's pool.
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
