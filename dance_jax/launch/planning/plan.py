"""Plan a launch: decide where experts go and how much memory everything takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from dance_jax.config import DEFAULT_POLICY, ClusterSpec, EngineConfig, UserError
from dance_jax.engine.kv_cache import cache_bytes, state_bytes, state_copies
from dance_jax.launch.planning.costs import cluster_cost, cost_note
from dance_jax.launch.planning.exchange import ExchangeChoice, choose_exchange, exchange_notes
from dance_jax.launch.planning.loss import loss_lines, losses
from dance_jax.memory import format_bytes
from dance_jax.models.config import ModelConfig
from dance_jax.models.rounding import unfit_report
from dance_jax.placement.activations import Activations
from dance_jax.placement.core import Layout, Placement
from dance_jax.placement.devices import spread
from dance_jax.placement.policies import POLICIES, place, usable, why_not
from dance_jax.placement.spare import spare_slots
from dance_jax.placement.visit import MAX_SERVERS


class ModelFacts(Protocol):
    """The properties of a checkpoint that planning needs; see `models.checkpoint.Checkpoint`."""

    config: ModelConfig
    source: str
    fingerprint: str

    def expert_bytes(self, dtype: str) -> int: ...

    def trunk_bytes(self, dtype: str) -> int: ...

    def expert_formats(self, dtype: str) -> str: ...

    def trunk_formats(self, dtype: str) -> str: ...


@dataclasses.dataclass(frozen=True)
class Room:
    """Memory of one server, independent of the placement; bytes are per device."""

    name: str
    devices: int
    trunk_bytes: int
    kv_bytes: int
    #: Recurrent states of all sequences that run at once; 0 for models without such states.
    state_bytes: int
    #: The expert pool: slots x bytes of an expert, whether full or empty.
    pool_bytes: int
    slots: int
    #: Slots that stay empty, so that experts can move; see `spare_slots`.
    spare: int

    @property
    def device_bytes(self) -> int:
        """Bytes of all parts together."""
        return self.trunk_bytes + self.kv_bytes + self.state_bytes + self.pool_bytes

    @property
    def capacity(self) -> int:
        """Number of experts that all devices together may hold."""
        return (self.slots - self.spare) * self.devices


@dataclasses.dataclass(frozen=True)
class ServerPlan(Room):
    """One server's part of a plan."""

    #: Number of resident experts of each MoE layer.
    resident: tuple[int, ...]
    #: Predicted share of expert calls of the server's requests that stay on the server.
    local_share: float


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Placement of all experts, and its consequences."""

    spec: ClusterSpec
    #: The policy that was used.
    policy: str
    placement: Placement
    layout: Layout
    servers: tuple[ServerPlan, ...]
    #: Predicted share of all expert calls that stay local, weighted by the activations' counts.
    local_share: float
    expert_bytes: int
    #: Formats of the weights and of hidden states on the wire, as text.
    weights: str
    exchange: ExchangeChoice
    #: Sentences for the user about the model and about information that the policy lacked.
    notes: tuple[str, ...]


def rooms(
    spec: ClusterSpec,
    model: ModelFacts,
    config: EngineConfig,
    survive: int = 0,
    alone: bool = True,
) -> tuple[Room, ...]:
    """Compute the memory of each server, in the order of the servers.

    Args:
        spec: the servers.
        model: the checkpoint.
        config: of the engines.
        survive: servers that may be lost at once: every expert needs one more holder than that.
        alone: there are no other servers, so these must have memory for all experts.

    Raises:
        UserError: there are too many servers, or their memory is too small for all experts, or
            either is too little to survive such losses.
    """
    if len(spec.servers) > MAX_SERVERS:
        raise UserError(f"{len(spec.servers)} servers: at most {MAX_SERVERS} can serve a model")
    experts = len(model.config.moe_layers) * model.config.num_experts
    expert_bytes = model.expert_bytes(config.dtype)
    # No device can use more slots than there are experts.
    slots = [min(server.slots(expert_bytes), experts) for server in spec.servers]
    if alone:
        _check_capacity(spec, slots, experts, expert_bytes, survive)
    copies = state_copies(len(spec.servers), calls=config.exchange != "collectives")
    fixed = (
        model.trunk_bytes(config.dtype),
        cache_bytes(model.config, config, copies),
        state_bytes(model.config, config, copies),
    )
    return tuple(
        Room(server.name, server.devices, *fixed, count * expert_bytes, count, spare)
        for server, count, spare in zip(
            spec.servers,
            slots,
            spare_slots(slots, spec.devices, experts, survive + 1),
            strict=True,
        )
    )


def matched(
    activations: Activations | None, spec: ClusterSpec, model: ModelFacts
) -> Activations | None:
    """The activations in the order of the servers; None if none are given.

    Raises:
        UserError: the activations are of another model, or a server is missing in them.
    """
    if activations is None:
        return None
    layers, experts = len(model.config.moe_layers), model.config.num_experts
    activations.check_model(model.source, layers, experts)
    return activations.for_servers(spec.names)


def make_plan(
    spec: ClusterSpec,
    model: ModelFacts,
    config: EngineConfig,
    policy: str = DEFAULT_POLICY,
    activations: Activations | None = None,
    service: bool = False,
    survive: int = 0,
) -> Plan:
    """Place a model's experts on the servers.

    Args:
        spec: the servers; rates still to be measured count as unknown.
        model: the checkpoint.
        config: of the engines.
        policy: a name in `placement.POLICIES`; where it cannot place, `placement.usable` takes
            another policy.
        activations: statistics of every server's requests; None: all counts are equal.
        service: requests arrive at independent times, as opposed to a batch.
        survive: servers that a service may lose at once, with nothing to load.

    Raises:
        UserError: the servers are too few or have too little memory, the activations are of another
            model or lack a server, or the policy is unknown.
    """
    held = rooms(spec, model, config, survive)
    activations = matched(activations, spec, model)
    if activations is None:
        shape = (len(spec.servers), len(model.config.moe_layers), model.config.num_experts)
        counts, routes = np.ones(shape, np.int64), None
    else:
        counts = activations.counts
        # Activations recorded without any request have no tokens and no k.
        routes = activations.routes if any(map(len, activations.routes)) else None
    used = usable(policy, routes)

    def placed(config: EngineConfig) -> tuple[Placement, ExchangeChoice]:
        """Place for the given exchange, and choose the exchange for that placement."""
        placement = place(
            used,
            counts,
            [room.capacity for room in held],
            holders=survive + 1,
            routes=routes,
            devices=spec.devices,
            cost=cluster_cost(spec, model.config, config, service=service),
            seed=config.seed,
        )
        share = placement.local_share(counts)
        return placement, choose_exchange(spec, model.config, config, share, survive)

    placement, exchange = placed(config)
    if exchange.name == "collectives" != config.exchange:
        placement, _ = placed(dataclasses.replace(config, exchange=exchange.name))
    slots, spare = zip(*((room.slots, room.spare) for room in held), strict=True)
    shares = placement.local_shares(counts).tolist()
    servers = tuple(
        ServerPlan(**vars(room), resident=tuple(resident), local_share=share)
        for room, resident, share in zip(
            held, placement.resident.sum(2).tolist(), shares, strict=True
        )
    )
    layout = spread(placement, spec.devices, slots, counts, spare=spare, holders=survive + 1)
    return Plan(
        spec=spec,
        policy=used,
        placement=placement,
        layout=layout,
        servers=servers,
        local_share=placement.local_share(counts),
        expert_bytes=model.expert_bytes(config.dtype),
        weights=weights_note(model, config),
        exchange=exchange,
        notes=(
            *model_notes(model.config, config),
            *_notes(spec, why_not(policy, routes), used, activations),
            *spare_notes(servers, placement),
            *exchange_notes(exchange, len(spec.servers)),
            *(loss_notes(layout, exchange, spec, counts, model, config) if service else ()),
        ),
    )


def loss_notes(
    layout: Layout,
    exchange: ExchangeChoice,
    spec: ClusterSpec,
    counts: np.ndarray,
    model: ModelFacts,
    config: EngineConfig,
) -> Iterator[str]:
    """Notes about the loss of each server of a service; none if all engines end together."""
    if exchange.name == "calls" and len(spec.servers) > 1:
        size = model.expert_bytes(config.dtype)
        found = losses(layout, spec.servers, counts, size)
        yield from loss_lines(found, spec.servers, layout.holders, size)


def weights_note(model: ModelFacts, config: EngineConfig) -> str:
    """Describe the formats of the weights and of hidden states on the wire."""
    experts, trunk = model.expert_formats(config.dtype), model.trunk_formats(config.dtype)
    return (
        f"Weights: experts {experts}, trunk {trunk}.\n"
        f"Wire: hidden states in {config.wire_dtype}, sums in float32."
    )


def model_notes(model: ModelConfig, config: EngineConfig) -> Iterator[str]:
    """Notes for the user about the model's memory and architecture."""
    if model.state_bytes:
        yield (
            f"The model has recurrent states: {format_bytes(model.state_bytes)} for each of the "
            f"{config.max_num_seqs} sequences that run at once on a device (twice that if servers "
            "call each other), plus one more. Requests with a common prefix do not share its "
            "computation."
        )
    for original in sorted(model.trained_contexts):
        which = "longer" if config.max_model_len > original else "shorter"
        yield (
            f"The model has two sets of rotary frequencies (longrope): one for contexts of up to "
            f"{original} tokens, one for longer contexts. max_model_len is "
            f"{config.max_model_len}, so all requests use the set for {which} contexts."
        )
    for note in unfit_report(config.rounding, model):
        yield f"{note}."
    if model.quantization:
        yield f"The model's weights are quantised ({model.quantization}) and stay as they are."


def _notes(
    spec: ClusterSpec, why: str, used: str, activations: Activations | None
) -> Iterator[str]:
    if activations is None:
        yield (
            "No activations were given (--activations), so every expert counts the same on every "
            "server."
        )
    if why:
        yield f"{why}: policy {used} is used instead."
    note = cost_note(spec) if POLICIES[used].weighs_cost else None
    if note is not None:
        yield note


def spare_notes(held: Sequence[Room], placement: Placement) -> Iterator[str]:
    """Notes about servers that cannot receive experts."""
    if fixed := [
        room.name
        for room, resident in zip(held, placement.resident, strict=True)
        if not room.spare and not resident.all()
    ]:
        yield (
            f"No spare slot on {', '.join(fixed)}: no other experts can be loaded there, and "
            "migrations that need to are refused. Give these servers more memory= (or experts=) in "
            "the hosts file."
        )


def _check_capacity(
    spec: ClusterSpec, slots: list[int], experts: int, expert_bytes: int, survive: int
) -> None:
    holders, servers = survive + 1, len(spec.servers)
    if holders > servers:
        raise UserError(
            f"--survive {survive}: every expert needs {holders} servers that hold it, but the "
            f"hosts file has {servers}: add servers, or use --survive {servers - 1} at most"
        )
    # A server holds an expert once, so it has no use for more slots than there are experts.
    usable = [
        min(count * devices, experts) for count, devices in zip(slots, spec.devices, strict=True)
    ]
    missing = holders * experts - sum(usable)
    if missing <= 0:
        return
    each = ", ".join(
        f"{server.name} {count}" for server, count in zip(spec.servers, usable, strict=True)
    )
    needed, instead = "", ""
    if survive:
        needed = (
            f", and with --survive {survive} each of them needs {holders} servers that hold it: "
            f"{holders * experts:,} slots"
        )
        instead = ", or use a smaller --survive"
    raise UserError(
        f"too little memory: the model has {experts:,} experts of {format_bytes(expert_bytes)}"
        f"{needed}, but the servers have {sum(usable):,} slots ({each}); {missing:,} slots are "
        f"missing, {missing * expert_bytes:,} bytes ({format_bytes(missing * expert_bytes)}): "
        f"give servers more memory= (or experts=) in the hosts file, or add a server{instead}"
    )
