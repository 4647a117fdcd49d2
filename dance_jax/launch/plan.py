"""Decides, before anything starts, who holds which experts, and says what that takes."""

from __future__ import annotations

import dataclasses
import io
from typing import Protocol

import numpy as np

from dance_jax.config import ClusterSpec, EngineConfig, UserError
from dance_jax.engine.kv_cache import cache_bytes
from dance_jax.models.config import ModelConfig
from dance_jax.placement.activations import Activations
from dance_jax.placement.core import Layout, Placement, spread
from dance_jax.placement.policies import place


class ModelFacts(Protocol):
    """What planning needs of a checkpoint; `models.checkpoint.Checkpoint` has it."""

    config: ModelConfig
    fingerprint: str

    def expert_bytes(self, dtype: str) -> int: ...

    def trunk_bytes(self, dtype: str) -> int: ...


@dataclasses.dataclass(frozen=True)
class ServerPlan:
    """One server's part of a plan; bytes are per device."""

    name: str
    devices: int
    trunk_bytes: int
    kv_bytes: int
    #: The expert pool: slots x bytes of an expert, full or not.
    pool_bytes: int
    slots: int
    #: Experts resident on the server in each MoE layer.
    resident: tuple[int, ...]
    #: Predicted share of its requests' expert calls served without leaving it.
    local_share: float


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Where everything goes."""

    spec: ClusterSpec
    policy: str
    placement: Placement
    layout: Layout
    servers: tuple[ServerPlan, ...]
    #: Of all expert calls, weighed by the activations' counts.
    local_share: float
    #: No activations were given: all counts were taken as equal.
    equal_counts: bool
    expert_bytes: int


def make_plan(
    spec: ClusterSpec,
    model: ModelFacts,
    config: EngineConfig,
    policy: str = "dance",
    activations: Activations | None = None,
) -> Plan:
    """Places a model's experts on servers.

    Args:
        spec: the servers.
        model: the checkpoint.
        config: of the engines.
        policy: a name in `placement.POLICIES`.
        activations: statistics of every server's requests; None: all counts are equal.

    Raises:
        UserError: the servers together lack memory, the activations are of another model or lack
            a server, or the policy is unknown.
    """
    layers, experts = len(model.config.moe_layers), model.config.num_experts
    expert_bytes = model.expert_bytes(config.dtype)
    # No device can use more slots than there are experts.
    slots = [min(server.slots(expert_bytes), layers * experts) for server in spec.servers]
    _check_capacity(spec, slots, layers * experts, expert_bytes)
    if activations is None:
        counts, routes = np.ones((len(spec.servers), layers, experts), np.int64), None
    else:
        activations.check_model(model.fingerprint, layers, experts)
        activations = activations.for_servers(spec.names)
        counts, routes = activations.counts, activations.routes or None
    capacities = [count * devices for count, devices in zip(slots, spec.devices, strict=True)]
    placement = place(
        policy, counts, capacities, routes=routes, devices=spec.devices, seed=config.seed
    )
    shares = placement.local_shares(counts)
    servers = tuple(
        ServerPlan(
            name=server.name,
            devices=server.devices,
            trunk_bytes=model.trunk_bytes(config.dtype),
            kv_bytes=cache_bytes(model.config, config),
            pool_bytes=slots[rank] * expert_bytes,
            slots=slots[rank],
            resident=tuple(int(n) for n in placement.resident[rank].sum(1)),
            local_share=float(shares[rank]),
        )
        for rank, server in enumerate(spec.servers)
    )
    return Plan(
        spec=spec,
        policy=policy,
        placement=placement,
        layout=spread(placement, spec.devices, slots, counts),
        servers=servers,
        local_share=placement.local_share(counts),
        equal_counts=activations is None,
        expert_bytes=expert_bytes,
    )


def _check_capacity(spec: ClusterSpec, slots: list[int], experts: int, expert_bytes: int) -> None:
    have = sum(count * devices for count, devices in zip(slots, spec.devices, strict=True))
    missing = experts - have
    if missing <= 0:
        return
    each = ", ".join(
        f"{server.name} {count * server.devices}"
        for server, count in zip(spec.servers, slots, strict=True)
    )
    raise UserError(
        f"too little memory: the model has {experts:,} experts of {format_bytes(expert_bytes)}, "
        f"the servers hold {have:,} ({each}); {missing:,} slots are missing, "
        f"{missing * expert_bytes:,} bytes ({format_bytes(missing * expert_bytes)}); "
        "give servers more memory= (or experts=) in the hosts file, or add a server"
    )


def format_bytes(count: float) -> str:
    """Bytes with a binary unit.

    >>> format_bytes(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


_LAYOUT_KEYS = ("holders", "device_of", "slot_of", "devices", "slots_per_device")


def dump_layout(layout: Layout) -> bytes:
    """A layout for the workers, as an npz file's content."""
    arrays = {key: np.asarray(getattr(layout, key)) for key in _LAYOUT_KEYS}
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return file.getvalue()


def parse_layout(content: bytes) -> Layout:
    """Reads what `dump_layout` made."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        found = {key: file[key] for key in _LAYOUT_KEYS}
    return Layout(
        holders=found["holders"],
        device_of=found["device_of"],
        slot_of=found["slot_of"],
        devices=tuple(int(n) for n in found["devices"]),
        slots_per_device=tuple(int(n) for n in found["slots_per_device"]),
    )
