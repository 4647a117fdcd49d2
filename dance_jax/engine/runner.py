"""Owner of jit, buckets, pools and tables of one engine process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from dance_jax.config import EngineConfig
from dance_jax.engine import step as step_module
from dance_jax.engine.compile_cache import CompileCache
from dance_jax.engine.kv_cache import Memory, new_memory
from dance_jax.engine.pools import Pools, make_pools
from dance_jax.engine.sampling import adjustments, adjusts
from dance_jax.engine.scheduler import Row, StepPlan
from dance_jax.engine.shards import Shards
from dance_jax.engine.step import DECODING, IDLE, Bucket, Extras, Outcome
from dance_jax.models.collectives import Collectives
from dance_jax.models.config import ModelConfig
from dance_jax.models.exchange import Tables
from dance_jax.models.experts import ExpertFormat, Weights
from dance_jax.models.messages import Transport, say
from dance_jax.models.topology import AXIS, Topology
from dance_jax.placement.core import Layout

#: Reads experts: pairs (layer, expert) -> their places and weights, in any order.
ReadExperts = Callable[[list[tuple[int, int]]], Iterable[tuple[int, Weights]]]


def cluster_mesh(devices: tuple[int, ...]) -> Mesh:
    """The 1-D mesh over all servers' devices, in rank order.

    Raises:
        RuntimeError: the processes do not have these devices.
    """
    found = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if jax.process_count() == 1:
        found = found[: sum(devices)]
    have = tuple(
        sum(device.process_index == rank for device in found) for rank in range(len(devices))
    )
    if have != devices:
        raise RuntimeError(f"JAX sees {have} devices per server, the cluster has {devices}")
    return Mesh(np.array(found), (AXIS,))


class Runner:
    """Runs steps on this server's devices.

    Arrays of the step are global over the mesh, but every process has its own idea of their
    shapes: pools and token counts differ from server to server, and nothing ever looks at
    another process's shard (DESIGN: one SPMD program, a different shape on each server).

    Args:
        form: what a slot of the pool holds.
        blocks: KV blocks of each device, scratch not counted.
        transport: carries rows between servers; of one kind on all of them.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        trunk: nnx.Module,
        form: ExpertFormat,
        read_experts: ReadExperts,
        layout: Layout,
        rank: int,
        config: EngineConfig,
        blocks: int,
        compile_cache: CompileCache,
        transport: Transport | None = None,
    ):
        self.model_config = model_config
        self.form = form
        self.config = config
        self.topology = Topology(rank, layout.devices, config.max_step_tokens)
        self.mesh = cluster_mesh(layout.devices)
        self.shards = Shards(self.mesh)
        self.devices = self.shards.devices
        if jax.process_count() == 1 and len(layout.devices) > 1:
            raise RuntimeError("several servers need a process each")
        self._read_experts = read_experts
        self._compile_cache = compile_cache
        self.transport = transport or Collectives()
        self.blocks = blocks
        self._executables: dict[Bucket, Any] = {}
        #: Per bucket what a step without adjustments gets, on the devices.
        self._no_adjustments: dict[Bucket, jax.Array] = {}
        self.graphdef, state = nnx.split(trunk)
        # A plain dict: nnx's own containers are flattened in Python in every step.
        self.state = jax.tree.map(self.shards.replicated, nnx.to_pure_dict(state))
        self.pools = self._build_pools(layout)
        self.tables = self._build_tables(layout)
        memory = new_memory(model_config, config, blocks, self.transport)
        self.memory: Memory = jax.tree.map(
            lambda leaf: self.shards.per_device([leaf] * len(self.devices)), memory
        )

    # Experts.

    def _build_pools(self, layout: Layout) -> Pools:
        rank = self.topology.rank
        pools = make_pools(
            self.form,
            layout.slots_per_device[rank],
            self.shards,
            self._compile_cache,
            self.topology,
        )
        for device in range(len(self.devices)):
            experts_s2 = layout.experts_of(rank, device)
            used = np.flatnonzero(experts_s2[:, 0] >= 0)
            pairs = [(int(layer), int(expert)) for layer, expert in experts_s2[used]]
            experts = self._read_experts(pairs) if pairs else ()
            pools.fill(device, ((int(used[place]), weights) for place, weights in experts))
        return pools

    def _build_tables(self, layout: Layout) -> Tables:
        rank = self.topology.rank
        holders = [layout.holders] * len(self.devices)
        slot_of = [
            np.where(layout.device_of[rank] == d, layout.slot_of[rank], -1).astype(np.int32)
            for d in range(len(self.devices))
        ]
        return Tables(self.shards.per_device(holders), self.shards.per_device(slot_of))

    def place(self, layout: Layout) -> None:
        """Put another placement in force, read anew; the step is not compiled again."""
        self.pools = self._build_pools(layout)
        self.use_tables(layout)

    def use_tables(self, layout: Layout) -> None:
        """From the next step on experts are looked for where `layout` says; the pool stays."""
        self.tables = self._build_tables(layout)

    # Steps.

    def compile(self, bucket: Bucket) -> Any:
        """The executable of a bucket, compiled at first use."""
        if bucket not in self._executables:
            key = ("step", self.topology, self.transport.name, self.blocks, bucket)
            self._executables[bucket] = self._compile_cache.compile(key, lambda: self.lower(bucket))
        return self._executables[bucket]

    def lower(self, bucket: Bucket) -> jax.stages.Lowered:
        """The step of a bucket, traced for this process."""
        nothing = ((),) * len(self.devices)
        batch = self._pack_batches(nothing, bucket, IDLE)
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            (
                step_module.host_batch((), bucket, self.config, IDLE),
                adjustments({}, sum(bucket), self.config.max_model_len),
            ),
        )
        one_device = functools.partial(
            step_module.run_step,
            self.graphdef,
            self.form,
            self.topology,
            self.transport,
            self.config,
            bucket,
            like,
        )

        def body(state, *per_device):
            own = jax.tree.map(lambda leaf: leaf[0], per_device)
            result = one_device(state, *own)
            return jax.tree.map(lambda leaf: leaf[None], result)

        sharded = PartitionSpec(AXIS)
        mapped = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), *[sharded] * 5),
            out_specs=sharded,
            check_vma=False,
        )
        stepper = jax.jit(mapped, donate_argnums=3)
        changes = self._pack_adjustments(nothing, bucket)
        return stepper.lower(
            self.state, self.pools.argument, self.tables, self.memory, batch, changes
        )

    def _pack_batches(
        self, entries: tuple[tuple[Row, ...], ...], bucket: Bucket, said: int
    ) -> jax.Array:
        return self.shards.per_device(
            [
                step_module.pack(step_module.host_batch(rows, bucket, self.config, said))
                for rows in entries
            ]
        )

    def _pack_adjustments(self, entries: tuple[tuple[Row, ...], ...], bucket: Bucket) -> jax.Array:
        """`Adjustments` of every device; what most steps have of them stays on the devices."""
        sampled = [{row.index: row.sequence for row in rows if row.sample} for rows in entries]
        wanted = any(adjusts(sequence) for rows in sampled for sequence in rows.values())
        if not wanted and bucket in self._no_adjustments:
            return self._no_adjustments[bucket]
        longest = self.config.max_model_len
        packed = self.shards.per_device(
            [step_module.pack(adjustments(rows, sum(bucket), longest)) for rows in sampled]
        )
        if not wanted:
            self._no_adjustments[bucket] = packed
        return packed

    def run(
        self, plan: StepPlan, work: int | None = None, loaded: int = 0
    ) -> tuple[list[Outcome], Extras]:
        """Runs one step, together with all other servers' steps.

        Args:
            plan: this server's rows; an empty plan takes part with padding alone.
            work: what the others are told; None: what the plan says.
            loaded: and the batch of experts that this server is ready to put in place; 0: none.

        Returns:
            The outcome of each device, in numpy, and the extras, still on the devices.
        """
        bucket = self.config.buckets[0] if plan.empty else plan.bucket
        if work is None:
            work = IDLE if plan.empty else DECODING if plan.decoding else step_module.BUSY
        executable = self.compile(bucket)
        batch = self._pack_batches(plan.entries, bucket, say(work, loaded))
        changes = self._pack_adjustments(plan.entries, bucket)
        self.memory, packed, extras = executable(
            self.state, self.pools.argument, self.tables, self.memory, batch, changes
        )
        like = self._outcome_like(sum(bucket))
        outcomes = [step_module.unpack_host(vector, like) for vector in self.shards.local(packed)]
        return outcomes, extras

    def _outcome_like(self, rows: int) -> Outcome:
        layers, servers = len(self.model_config.moe_layers), self.topology.num_servers
        return Outcome(
            token=np.zeros(rows, np.int32),
            logprob=np.zeros(rows, np.float32),
            rank=np.zeros(rows, np.int32),
            work=np.zeros((), np.int32),
            loaded=np.zeros((), np.int32),
            rows=np.zeros((layers, servers, servers), np.int32),
            bytes=np.zeros((layers, servers, servers), np.int32),
        )

    def read(self, array: jax.Array) -> list[np.ndarray]:
        """A per-device array of the step (an extra, or of the memory), one per local device."""
        return self.shards.local(array)

    def counts(self) -> np.ndarray:
        """int64 [l, e]: expert calls of this server's tokens since the start."""
        return sum(part.astype(np.int64) for part in self.shards.local(self.memory.counts))  # type: ignore
