"""A step that is nothing but MoE layers: what one server compiles, runs, times and traces."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.trace import self_times
from dance_jax.engine.compile_cache import CompileCache
from dance_jax.engine.pools import make_pools
from dance_jax.engine.runner import cluster_mesh
from dance_jax.engine.shards import Shards
from dance_jax.models import links_cpu
from dance_jax.models.exchange import Exchange, Tables
from dance_jax.models.experts import ExpertFormat
from dance_jax.models.formats import WeightFormat
from dance_jax.models.layers import SILU
from dance_jax.models.links_cpu import Counters
from dance_jax.models.messages import Transport
from dance_jax.models.topology import AXIS, Topology
from dance_jax.placement.core import spread

from .routes import Sizes, draw_routes

#: What an operation is part of: by the kernel it calls, else by its kind.
_KERNELS = {
    "GroupedFfn": "experts",
    "LinksDispatch": "links",
    "LinksReturn": "links",
    "SiblingsGather": "collectives",
    "SiblingsSum": "collectives",
}
_KINDS = {"collective-permute": "collectives"}


@dataclasses.dataclass(frozen=True)
class Timed:
    """Some steps of one server."""

    #: Seconds of each.
    seconds: list[float]
    #: What its links counted in all of them.
    links: Counters
    #: int [n, n], hidden states from server to server, in all layers of one step.
    rows: np.ndarray

    @property
    def total_s(self) -> float:
        return sum(self.seconds)


class Layers:
    """The MoE layers of one server, compiled for a number of tokens.

    As in the engine, processes differ in their pools and agree on the messages alone.
    """

    def __init__(
        self,
        sizes: Sizes,
        rank: int,
        tokens: int,
        room: int,
        transport: Transport,
        wire_dtype: str,
    ):
        """
        Args:
            tokens: of each device in a step.
            room: most tokens of a device that the compiled step has to reckon with, as a decode
                step of the engine has to with its neighbour's prefill.
            wire_dtype: as in EngineConfig.
        """
        self.sizes, self.rank, self.tokens, self.transport = sizes, rank, tokens, transport
        self.mesh = cluster_mesh(sizes.devices)
        self.devices = jax.local_devices()
        rng = np.random.default_rng([rank, 1])
        layout = spread(sizes.placement(), sizes.devices, sizes.slots())
        d, f, slots = sizes.hidden, sizes.width, sizes.slots()[rank]

        def weights(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))

        mine = range(len(self.devices))
        wide = WeightFormat("float32")
        self.form = ExpertFormat(d, f, wide, wide, wide, SILU, bias=False)
        topology = Topology(rank, sizes.devices, room)
        shards = Shards(self.mesh)
        self.pools = make_pools(self.form, slots, shards, CompileCache(None), topology)
        for device in mine:
            self.pools.fill(
                device,
                (
                    (slot, tuple(weights(*leaf.shape) for leaf in self.form.leaves.values()))
                    for slot in range(slots)
                ),
            )
        self.pool = self.pools.argument
        slot_of = [
            np.where(layout.device_of[rank] == n, layout.slot_of[rank], -1).astype(np.int32)
            for n in mine
        ]
        self.tables = Tables(self._global([layout.holders for _ in mine]), self._global(slot_of))
        self.memory = jax.tree.map(
            lambda leaf: self._global([leaf for _ in mine]), transport.memory(sizes.layers)
        )
        self.x = self._global([rng.standard_normal((tokens, d), np.float32) for _ in mine])
        self._step = self._compile(topology, jnp.dtype(wire_dtype.replace("compute", "float32")))

    def draw(self, local_share: float, seed: int) -> None:
        """New routes for the steps to come."""
        rng = np.random.default_rng([self.rank, seed])
        devices = len(self.devices)
        routes_tlk = draw_routes(self.sizes, self.rank, self.tokens * devices, local_share, rng)
        routes_dltk = routes_tlk.reshape(devices, self.tokens, *routes_tlk.shape[1:])
        self.routes = self._global(list(routes_dltk.swapaxes(1, 2)))

    def run(self, steps: int) -> Timed:
        """Runs steps together with the other servers; the first begins when all are here."""
        before, seconds, rows = self._counters(), [], None
        for _ in range(steps):
            began = time.perf_counter()
            rows = self._run_one()
            seconds.append(time.perf_counter() - began)
        assert rows is not None
        shard = rows.addressable_shards[0].data
        return Timed(seconds, _since(before, self._counters()), np.asarray(shard)[0].sum(0))

    def trace(self, steps: int) -> dict[str, float]:
        """Seconds of a layer by part, see `benchmarks.layers`; mean over the devices here."""
        operations = dict(_parts(self._step.as_text() or ""))
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory, profiler_options=options):
                timed = self.run(steps)
            (path,) = pathlib.Path(directory).rglob("*.trace.json.gz")
            events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        traced = self_times(events, operations, "packing")
        phases = timed.links.dispatch, timed.links.give_back
        parts = {
            "waiting": sum(phase.waited_s for phase in phases),
            "moving": sum(phase.moved_s for phase in phases),
            "collectives": traced["collectives"] * 1e-6 / len(self.devices),
            "experts": traced["experts"] * 1e-6 / len(self.devices),
        }
        parts["packing"] = max(timed.total_s - sum(parts.values()), 0.0)
        return {part: spent / steps / self.sizes.layers for part, spent in parts.items()}

    def _run_one(self) -> Array:
        arguments = (self.pool, self.tables, self.memory, self.x, self.routes)
        self.memory, rows, out = self._step(*arguments)
        jax.block_until_ready(out)
        return rows

    def _compile(self, topology: Topology, wire_dtype: np.dtype) -> jax.stages.Compiled:
        sizes = self.sizes

        form = self.form

        def one_device(pool, tables, memory, x_td, route_ltk):
            work = jnp.int32(1)
            exchange = Exchange(topology, form, pool, tables, work, self.transport, wire_dtype)
            weight_tk = jnp.full(route_ltk.shape[1:], 1 / sizes.top_k, jnp.float32)
            valid_t = jnp.ones(x_td.shape[0], bool)

            def layer(x_td, turn):
                number, known = turn
                y_td, exchanged = exchange(
                    number, x_td, route_ltk[number], weight_tk, valid_t, known
                )
                return x_td + y_td, (exchanged.memory, exchanged.rows)

            turns = (jnp.arange(sizes.layers, dtype=jnp.int32), memory)
            out_td, (memory, rows_lnn) = lax.scan(layer, x_td, turns)
            return memory, rows_lnn, out_td

        def body(*arguments):
            own = jax.tree.map(lambda leaf: leaf[0], arguments)
            return jax.tree.map(lambda leaf: leaf[None], one_device(*own))

        sharded = PartitionSpec(AXIS)
        mapped = jax.shard_map(
            body, mesh=self.mesh, in_specs=sharded, out_specs=sharded, check_vma=False
        )
        shape = (self.mesh.size, sizes.layers, self.tokens, sizes.top_k)
        routes = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(self.mesh, sharded))
        stepper = jax.jit(mapped)
        return stepper.lower(self.pool, self.tables, self.memory, self.x, routes).compile()

    def _global(self, shards: list[Any]) -> Array:
        """One array per device of this server -> a global array over all servers' devices."""
        arrays = [
            jax.device_put(np.asarray(shard)[None], device)
            for shard, device in zip(shards, self.devices, strict=True)
        ]
        shape = (self.mesh.size, *arrays[0].shape[1:])
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def _counters(self) -> Counters:
        return links_cpu.counters(self.sizes.servers)


def _since(before: Any, after: Any) -> Any:
    """What counters have counted between two readings."""
    if dataclasses.is_dataclass(after):
        fields = (field.name for field in dataclasses.fields(after))
        parts = {name: _since(getattr(before, name), getattr(after, name)) for name in fields}
        return type(after)(**parts)  # type: ignore[operator]
    if isinstance(after, tuple):
        return tuple(_since(a, b) for a, b in zip(before, after, strict=True))
    return after - before


def _parts(hlo: str) -> Iterator[tuple[str, str]]:
    """Operation -> the part it belongs to; all others are packing."""
    for line in hlo.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z\-]+)\(", line)
        if match is None:
            continue
        name, kind = match.groups()
        for kernel, part in _KERNELS.items():
            if f".{kernel}" in line and kind == "custom-call":
                yield name, part
        if part := _KINDS.get(kind.removesuffix("-start").removesuffix("-done")):
            yield name, part
