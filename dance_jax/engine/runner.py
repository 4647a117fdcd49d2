"""The runner of one engine process: owns compiled steps, pools, tables and device memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dance_jax.config import EngineConfig
from dance_jax.engine import sequence
from dance_jax.engine import step as step_module
from dance_jax.engine.allowed import Masks
from dance_jax.engine.compile_cache import CompileCache
from dance_jax.engine.kv_cache import Memory, new_memory
from dance_jax.engine.pools import (
    ArrayExperts,
    ArrayPools,
    NativePools,
    Pools,
    SlotWrite,
    make_pools,
)
from dance_jax.engine.sampling import adjustments, adjusts
from dance_jax.engine.scheduler import Row, StepPlan
from dance_jax.engine.shards import Shards
from dance_jax.engine.step import (
    DECODING,
    IDLE,
    Bucket,
    Crossed,
    Extras,
    Form,
    Outcome,
    Record,
)
from dance_jax.memory import give_back
from dance_jax.models import native
from dance_jax.models.call_messages import Wire
from dance_jax.models.calls import CallServer
from dance_jax.models.collectives import Collectives
from dance_jax.models.config import ModelConfig
from dance_jax.models.exchange import (
    Calls,
    Experts,
    HostCalls,
    LockStep,
    Tables,
    TracedExchange,
)
from dance_jax.models.experts import ExpertFormat, Weights
from dance_jax.models.host_caller import HostRows
from dance_jax.models.host_calls import HostCallServer
from dance_jax.models.host_state import CallSpec
from dance_jax.models.lock_step_messages import Transport, status_word
from dance_jax.models.topology import AXIS, Topology
from dance_jax.models.trunk import Trunk, rope_of, split_trunk
from dance_jax.placement.core import Layout
from dance_jax.placement.visit import masks, places

#: Of each device, row -> sequence sampled in that row.
_Sampled = Sequence[Mapping[int, sequence.Sequence]]
#: Reads experts: pairs (layer, expert) -> (index of the pair, its weights), in any order.
ReadExperts = Callable[[list[tuple[int, int]]], Iterable[tuple[int, Weights]]]


class Parts(NamedTuple):
    """The compiled parts of a step, in order (step.py)."""

    begin: Any
    #: One part or `Halves` per layer; identical layers share them.
    layers: list[Any]
    logits: Any
    choose: Any


class Halves(NamedTuple):
    """The two compiled parts of a layer whose routed experts are computed on the host."""

    start: Any
    finish: Any


def cluster_mesh(devices: tuple[int, ...]) -> Mesh:
    """The 1-D mesh over all servers' devices, in rank order.

    Raises:
        RuntimeError: the processes have other devices.
    """
    found = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    have = tuple(
        sum(device.process_index == rank for device in found) for rank in range(len(devices))
    )
    if have != devices:
        raise RuntimeError(f"JAX sees {have} devices per server, but the cluster has {devices}")
    return Mesh(np.array(found), (AXIS,))


def own_mesh(devices: int) -> Mesh:
    """The 1-D mesh over this process's first `devices` devices.

    Raises:
        RuntimeError: the process has fewer devices.
    """
    found = jax.local_devices()
    if len(found) < devices:
        raise RuntimeError(f"JAX sees {len(found)} devices, but the server needs {devices}")
    return Mesh(np.array(found[:devices]), (AXIS,))


class Runner:
    """Runs steps on this server's devices.

    A step's arrays are global over the mesh, but their shapes may differ between processes: pools
    and token counts differ from server to server, and no process ever reads another process's
    shard (DESIGN: one SPMD program, a different shape on each server).

    Args:
        form: the format of a slot of the pool.
        blocks: KV blocks of each device, without the scratch block.
        state_copies: see kv_cache.py.
        transport: carries rows between servers that step together, the same kind on all of them;
            None if each server steps on its own and servers call each other's experts.
        order: ranks of all servers in the order in which this server prefers to call them
            (`visit.preferences`); None for ascending ranks.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        trunk: Trunk,
        form: ExpertFormat,
        read_experts: ReadExperts,
        layout: Layout,
        rank: int,
        config: EngineConfig,
        blocks: int,
        compile_cache: CompileCache,
        transport: Transport | None = None,
        state_copies: int = 1,
        order: Iterable[int] | None = None,
    ):
        self.model_config = model_config
        self.form = form
        self.config = config
        self.rank = rank
        self._order = tuple(range(len(layout.devices)) if order is None else order)
        own = (layout.devices[rank],)
        #: The topology of the servers that step together: all servers, or this one alone.
        self.topology = Topology(0, own, config.max_step_tokens)
        if transport is not None:
            self.topology = Topology(rank, layout.devices, config.max_step_tokens)
        self.mesh = cluster_mesh(layout.devices) if transport else own_mesh(own[0])
        self.shards = Shards(self.mesh)
        self.devices = self.shards.devices
        self.exchange = self._make_exchange(transport)
        self._read_experts = read_experts
        self._compile_cache = compile_cache
        self.blocks, self._state_copies = blocks, state_copies
        self._executables: dict[Any, jax.stages.Compiled] = {}
        self._parts: dict[Bucket, Parts] = {}
        self._shapes: dict[Bucket, Any] = {}
        #: Number of decode rows -> empty adjustments on the devices.
        self._no_adjustments: dict[int, jax.Array] = {}
        ends, layers = split_trunk(trunk)
        self._ends, state = nnx.split(ends)
        self._layers, states = zip(*map(nnx.split, layers), strict=True)
        #: The trunk's weights, in plain dicts because nnx's containers are flattened in Python.
        self.state: dict[str, Any] = jax.tree.map(
            self.shards.replicated,
            {"ends": nnx.to_pure_dict(state), "layers": [*map(nnx.to_pure_dict, states)]},
        )
        kinds = [
            (graph, [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)])
            for graph, state in zip(self._layers, states, strict=True)
        ]
        #: Layer -> the first layer that compiles to the same executable.
        self._like = [kinds.index(kind) for kind in kinds]
        self._ropes = [rope_of(model_config, layer) for layer in range(len(layers))]
        #: Layer with routed experts -> its index among those layers, on the host and on devices.
        self._moe = {
            layer: (number, self._on_all(np.int32(number)))
            for number, layer in enumerate(model_config.moe_layers)
        }
        self.pools = self._build_pools(layout)
        #: Makes and answers expert calls; None if servers step together.
        self.calls = self._call_server()
        #: The C++ library's callers, as an argument of steps; and the tables of experts, used if
        #: servers step together.
        self._callers: jax.Array | None = None
        self.tables: Tables | None = None
        #: Masks of the tokens that may be sampled, and those of steps in which all tokens may.
        self.masks = Masks(model_config.vocab_size)
        self._no_masks: dict[int, jax.Array] = {}
        self.use_tables(layout)
        memory = new_memory(model_config, config, blocks, self.exchange, state_copies)
        self.memory: Memory = jax.tree.map(self._on_all, memory)

    def _make_exchange(self, transport: Transport | None) -> TracedExchange | HostCalls:
        servers = len(self._order)
        if transport is None and native.usable():
            # With recurrent states one group only: a state cannot pass from one group to the next.
            return Calls(2 if servers > 1 and not self.model_config.state_bytes else 1)
        if transport is None and servers > 1:
            return HostCalls()
        wire_dtype = jnp.dtype(self.config.wire_dtype)
        return LockStep(self.topology, self.form, transport or Collectives(), wire_dtype)

    def _call_server(self) -> CallServer | HostCallServer | None:
        model, config, pools = self.model_config, self.config, self.pools
        shape = (self.rank, self._order, len(model.moe_layers), model.num_experts)
        wire, most_rows = config.wire_dtype, config.max_step_tokens
        if isinstance(pools, NativePools) and isinstance(self.exchange, Calls):
            return CallServer(*shape, wire, most_rows, pools.devices)
        if isinstance(pools, ArrayPools) and isinstance(self.exchange, HostCalls):
            experts = ArrayExperts(
                pools, len(model.moe_layers), model.top_k, most_rows, jnp.dtype(config.dtype)
            )
            experts.compile(self._compile_cache, self.topology)
            spec = CallSpec(
                *shape, Wire(wire, model.hidden_size, model.num_experts), most_rows, model.top_k
            )
            return HostCallServer(spec, len(self.devices), experts)
        return None

    def _on_all(self, value: Any) -> jax.Array:
        """A copy of a value on each local device."""
        return self.shards.per_device([value] * len(self.devices))

    # Experts.

    def _build_pools(self, layout: Layout) -> Pools:
        pools = make_pools(
            self.form,
            layout.slots_per_device[self.rank],
            self.shards,
            self._compile_cache,
            self.topology,
        )
        for device in range(len(self.devices)):
            experts_s2 = layout.experts_of(self.rank, device)
            used = np.flatnonzero(experts_s2[:, 0] >= 0).tolist()
            pairs = [(int(layer), int(expert)) for layer, expert in experts_s2[used]]
            experts = self._read_experts(pairs) if pairs else ()
            pools.fill(
                device,
                (
                    SlotWrite(used[place], self.expert_number(*pairs[place]), weights)
                    for place, weights in experts
                ),
            )
        give_back()  # the memory of files read, and of trunk and experts before their layout
        return pools

    def expert_number(self, layer: int, expert: int) -> int:
        """The expert's number in the model, as in `SlotWrite.expert`."""
        return layer * self.model_config.num_experts + expert

    def _build_tables(self, layout: Layout) -> Tables:
        order_n = np.array(self._order)
        holders = [masks(layout.resident, order_n)] * len(self.devices)
        place = [places(order_n)] * len(self.devices)
        slot_of = [
            np.where(layout.device_of[self.rank] == d, layout.slot_of[self.rank], -1)
            for d in range(len(self.devices))
        ]
        slot_of = [each.astype(np.int32) for each in slot_of]
        return Tables(*map(self.shards.per_device, (holders, slot_of, place)))

    def use_tables(self, layout: Layout, number: int = 0) -> None:
        """Look up experts by `layout` from the next step on; the pool is not changed.

        Args:
            layout: the placement of all experts.
            number: number of the batch that led to the layout; 0 for the first layout.
        """
        if self.calls is None:
            self.tables = self._build_tables(layout)
        else:
            self.calls.use(number, layout.resident)
        if isinstance(self.calls, CallServer):
            callers = [np.int32(caller) for caller in self.calls.callers]
            self._callers = self.shards.per_device(callers)

    def stage_tables(self, layout: Layout, number: int) -> None:
        """Use `layout` for calls that other servers refuse because they have applied the batch."""
        if self.calls is not None:
            self.calls.stage(number, layout.resident)

    def drop_tables(self, number: int) -> None:
        """Drop the staged tables of batch `number` and of all later batches."""
        if self.calls is not None:
            self.calls.drop(number)

    # Steps.

    def compile(self, bucket: Bucket) -> Parts:
        """The parts of a bucket's step, compiled at first use; identical layers share a part."""
        if bucket not in self._parts:
            self._parts[bucket] = Parts(
                self._compiled(self._lower_begin, bucket),
                [self._compiled_layer(bucket, first) for first in self._like],
                self._compiled(self._lower_logits, bucket),
                self._compiled(self._lower_choose, bucket[0]),
            )
        return self._parts[bucket]

    def _compiled(
        self, lower: Callable[..., jax.stages.Lowered], *which: Bucket | int
    ) -> jax.stages.Compiled:
        sizes = self.blocks, self._state_copies
        key = (lower.__name__, self.topology, self.exchange.name, *sizes, *which)
        if key not in self._executables:
            self._executables[key] = self._compile_cache.compile(key, lambda: lower(*which))
        return self._executables[key]

    def _compiled_layer(self, bucket: Bucket, index: int) -> Any:
        if index not in self._moe or not isinstance(self.calls, HostCallServer):
            return self._compiled(self._lower_layer, bucket, index)
        return Halves(
            self._compiled(self._lower_start, bucket, index),
            self._compiled(self._lower_finish, bucket, index),
        )

    def _form(self, bucket: Bucket) -> Form:
        model = self.model_config
        layers, experts, k = len(model.moe_layers), model.num_experts, model.top_k
        return Form(bucket, self.config, self.exchange, layers, experts, k)

    def _lower_begin(self, bucket: Bucket) -> jax.stages.Lowered:
        def begin(ends, packed):
            return step_module.begin(self._form(bucket), nnx.merge(self._ends, ends), packed)

        return self._lower(begin, (), self.state["ends"], self._nothing(bucket))

    def _begun(self, bucket: Bucket) -> Any:
        """Shapes of the results of `begin`."""
        if bucket not in self._shapes:
            self._shapes[bucket] = self._given(self._lower_begin(bucket))
        return self._shapes[bucket]

    def _given(self, part: jax.stages.Lowered) -> Any:
        """Shapes of the results of a part."""
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            part.out_info,
        )

    def _lower_layer(self, bucket: Bucket, index: int) -> jax.stages.Lowered:
        """Lower layer `index`; hidden, cache, links and record are donated."""

        def layer(state, *arrays):
            layer = nnx.merge(self._layers[index], state)
            return step_module.layer(self._form(bucket), layer, *arrays)

        layer.__name__ = f"layer_{index}"
        hidden, rotations, _, record = self._begun(bucket)
        packed = self._nothing(bucket)
        arguments = self._arguments(index, hidden, rotations, packed, record)
        return self._lower(layer, (1, 4, 6, 7), *arguments)

    def _arguments(
        self,
        index: int,
        hidden: Any,
        rotations: Sequence[Any],
        packed: jax.Array,
        record: Record,
    ) -> tuple[Any, ...]:
        """The arguments of the part of a layer."""
        arguments = self._common_arguments(index, hidden, rotations, packed)
        if index not in self._moe:
            return *arguments, None, None, None
        number, layer = self._moe[index]
        pool = self.pools.argument if self._callers is None else self._callers
        experts = Experts(layer, pool, self.tables)
        return *arguments, experts, self.memory.links[number], record

    def _common_arguments(
        self, index: int, hidden: Any, rotations: Sequence[Any], packed: jax.Array
    ) -> tuple[Any, ...]:
        """The arguments that a whole layer and the first half of a split layer share."""
        rope = self._ropes[index]
        rotation = None if rope is None else rotations[rope]
        state, cache = self.state["layers"][index], self.memory.cache[index]
        return state, hidden, rotation, packed, cache

    def _lower_start(self, bucket: Bucket, index: int) -> jax.stages.Lowered:
        """Lower the first half of layer `index`; hidden and cache are donated."""

        def start(state, *arrays):
            layer = nnx.merge(self._layers[index], state)
            return step_module.start_layer(self._form(bucket), layer, *arrays)

        start.__name__ = f"start_{index}"
        hidden, rotations, _, record = self._begun(bucket)
        packed = self._nothing(bucket)
        arguments = self._common_arguments(index, hidden, rotations, packed)
        return self._lower(start, (1, 4), *arguments, record.failed)

    def _lower_finish(self, bucket: Bucket, index: int) -> jax.stages.Lowered:
        """Lower the second half of layer `index`; the record is donated."""

        def finish(state, *arrays):
            return step_module.finish_layer(nnx.merge(self._layers[index], state), *arrays)

        finish.__name__ = f"finish_{index}"
        rest, routed, valid, _ = self._given(self._lower_start(bucket, index))
        _, _, _, record = self._begun(bucket)
        number = self._moe[index][1]
        arrays = (rest, number, routed.expert, routed.x, valid, record)
        return self._lower(finish, (6,), self.state["layers"][index], *arrays)

    def _run_halves(
        self,
        index: int,
        halves: Halves,
        hidden: Any,
        rotations: Sequence[Any],
        packed: jax.Array,
        record: Record,
    ) -> tuple[Any, Record]:
        """Run a layer whose routed experts are computed on the host.

        Returns:
            The layer's output, and the record.
        """
        assert isinstance(self.calls, HostCallServer)
        arguments = self._common_arguments(index, hidden, rotations, packed)
        rest, routed, valid, self.memory.cache[index] = halves.start(*arguments, record.failed)
        number, layer = self._moe[index]
        local = [self.shards.local(each) for each in (*routed, valid)]
        rows = [HostRows(number, *own) for own in zip(*local, strict=True)]
        sums, failed = map(self.shards.per_device, zip(*self.calls.run(rows), strict=True))
        arrays = (rest, layer, routed.expert, sums, failed, record)
        return halves.finish(self.state["layers"][index], *arrays)

    def _lower_logits(self, bucket: Bucket) -> jax.stages.Lowered:
        def logits(ends, *arrays):
            return step_module.logits(self._form(bucket), nnx.merge(self._ends, ends), *arrays)

        hidden, _, _, record = self._begun(bucket)
        arrays = (hidden, self._nothing(bucket), self.memory.counts, record)
        return self._lower(logits, (3,), self.state["ends"], *arrays)

    def _lower_choose(self, rows: int) -> jax.stages.Lowered:
        def choose(_, *arrays):
            return step_module.choose(self.config.max_model_len, *arrays)

        scores = self._on_all(np.zeros((rows, self.model_config.vocab_size), np.float32))
        changes = self._pack_adjustments([{}] * len(self.devices), rows)
        _, _, state, record = self._begun((rows, 0))
        allowed = self._on_all(self.masks.none(rows))
        none = self._on_all(np.bool_(False))
        # Most of the compile time of a start is spent here. These options halve the time, and the
        # result is as fast (measured).
        quick = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
        options = quick if jax.default_backend() == "cpu" else None
        arrays = (scores, state, changes, allowed, none, record.crossed)
        return self._lower(choose, (), {}, *arrays, options=options)

    def _lower_score(self, bucket: Bucket) -> jax.stages.Lowered:
        def score(ends, *arrays):
            return step_module.score(nnx.merge(self._ends, ends), *arrays)

        hidden, _, _, _ = self._begun(bucket)
        tokens = self._on_all(np.zeros(self._form(bucket).tokens, np.int32))
        return self._lower(score, (), self.state["ends"], hidden, tokens)

    def _lower(
        self,
        function: Callable[..., Any],
        donated: tuple[int, ...],
        state: Any,
        *arrays: Any,
        options: dict[str, Any] | None = None,
    ) -> jax.stages.Lowered:
        """Map a function of one device's arrays over all devices, and lower it for this process.

        Args:
            function: a part of a step.
            donated: indices of donated arguments.
            state: the function's first argument, weights that are equal on all devices.
            arrays: the function's other arguments.
            options: XLA's compiler options.
        """

        def body(state, *arrays):
            result = function(state, *jax.tree.map(lambda leaf: leaf[0], arrays))
            return jax.tree.map(lambda leaf: leaf[None], result)

        body.__name__ = function.__name__
        sharded = PartitionSpec(AXIS)
        mapped = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), *[sharded] * len(arrays)),
            out_specs=sharded,
            check_vma=False,
        )
        jitted = jax.jit(mapped, donate_argnums=donated, compiler_options=options)
        return jitted.lower(state, *arrays)

    def _nothing(self, bucket: Bucket) -> jax.Array:
        """The packed batch of a step without rows."""
        return self.shards.per_device(self._packed(((),) * len(self.devices), bucket, IDLE))

    def _packed(
        self, entries: tuple[tuple[Row, ...], ...], bucket: Bucket, status: int
    ) -> list[np.ndarray]:
        """The packed batch of each device."""
        return [
            step_module.pack(step_module.host_batch(rows, bucket, self.config, status))
            for rows in entries
        ]

    def _pack_adjustments(self, sampled: _Sampled, decode: int) -> jax.Array:
        """Packed `Adjustments` of every device; empty ones, used by most steps, stay on devices."""
        wanted = any(adjusts(sequence) for rows in sampled for sequence in rows.values())
        if not wanted and decode in self._no_adjustments:
            return self._no_adjustments[decode]
        longest = self.config.max_model_len
        packed = self.shards.per_device(
            [step_module.pack(adjustments(rows, decode, longest)) for rows in sampled]
        )
        if not wanted:
            self._no_adjustments[decode] = packed
        return packed

    def _allowed(self, sampled: _Sampled, decode: int) -> Any:
        """The masks of every device; those of most steps stay on devices."""
        masks = self.masks.make(sampled, decode)
        if masks is not None:
            return self.shards.passed(masks)
        if decode not in self._no_masks:
            self._no_masks[decode] = self._on_all(self.masks.none(decode))
        return self._no_masks[decode]

    def _scores(self, plan: StepPlan, hidden: jax.Array) -> Any:
        """`step.score` of the step's tokens; None if no sequence wants logprobs of its prompt."""
        rows = [row for device in plan.entries for row in device]
        if all(row.sequence.prompt_logprobs is None for row in rows):
            return None
        tokens = [
            step_module.next_tokens(device, plan.bucket, self.config) for device in plan.entries
        ]
        score = self._compiled(self._lower_score, plan.bucket)
        return score(self.state["ends"], hidden, self.shards.per_device(tokens))

    def run(
        self, plan: StepPlan, work: int | None = None, loaded: int = 0
    ) -> tuple[list[Outcome], Extras]:
        """Run one step; servers that step together run it together.

        The host starts one part after the other and waits only for the outcome.

        Args:
            plan: this server's rows; an empty plan takes part with padding only.
            work: this server's work as told to the other servers (IDLE, BUSY or DECODING); None to
                derive it from the plan.
            loaded: the batch of experts that this server is ready to apply, told to the others as
                well; 0 for none.

        Returns:
            The outcome of each device, in numpy, and the extras, still on the devices.
        """
        bucket = self.config.buckets[0] if plan.empty else plan.bucket
        if work is None:
            work = IDLE if plan.empty else DECODING if plan.decoding else step_module.BUSY
        parts, ends, memory = self.compile(bucket), self.state["ends"], self.memory
        packed = self.shards.passed(self._packed(plan.entries, bucket, status_word(work, loaded)))
        sampled = [
            {n: row.sequence for n, row in enumerate(step_module.sampling_rows(rows))}
            for rows in plan.entries
        ]
        changes = self._pack_adjustments(sampled, bucket[0])
        hidden, rotations, state, record = parts.begin(ends, packed)
        for index, layer in enumerate(parts.layers):
            if isinstance(layer, Halves):
                run = (index, layer, hidden, rotations, packed, record)
                hidden, record = self._run_halves(*run)
                continue
            arguments = self._arguments(index, hidden, rotations, packed, record)
            hidden, memory.cache[index], links, recorded = layer(*arguments)
            if index in self._moe:
                memory.links[self._moe[index][0]], record = links, recorded
        logits, counts, any_failed = parts.logits(ends, hidden, packed, memory.counts, record)
        self.memory = memory._replace(counts=counts)
        scores = self._scores(plan, hidden)
        # The devices compute meanwhile.
        allowed = self._allowed(sampled, bucket[0])
        arrays = (logits, state, changes, allowed, any_failed, record.crossed)
        chosen, *top = parts.choose({}, *arrays)
        extras = Extras(top[0], top[1], record.routes, record.failed, logits, scores)
        own = self._nothing_crossed._replace(work=np.int32(work), loaded=np.int32(loaded))
        outcomes = [self._outcome(vector, bucket[0], own) for vector in self.shards.local(chosen)]
        return outcomes, extras

    def _outcome(self, packed: np.ndarray, rows: int, own: Crossed) -> Outcome:
        """Unpack the outcome of `choose`; a server that steps alone gets `own` as `crossed`."""
        numbers, alone = np.zeros(rows, np.int32), self.topology.num_servers == 1
        like = numbers, numbers.view(np.float32), numbers, np.bool_(0), None if alone else own
        outcome = Outcome(*step_module.unpack_host(packed, like))
        return outcome._replace(crossed=own) if alone else outcome

    @functools.cached_property
    def _nothing_crossed(self) -> Crossed:
        layers, servers = len(self.model_config.moe_layers), self.topology.num_servers
        links, none = np.zeros((layers, servers, servers), np.int32), np.zeros((), np.int32)
        return Crossed(links, links, np.zeros(layers, np.int32), none, none)

    def read(self, array: jax.Array) -> list[np.ndarray]:
        """Read a per-device array (an extra, or part of the memory), one array per local device."""
        return self.shards.local(array)

    def counts(self) -> np.ndarray:
        """int64 [l, e]: expert calls of this server's tokens since the start."""
        return sum(part.astype(np.int64) for part in self.shards.local(self.memory.counts))  # type: ignore
