"""What a service leaves for the next one: where experts are, and what users ask for."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from dance_jax.config import ClusterSpec, EngineConfig, UserError
from dance_jax.files import whole_file
from dance_jax.launch.planning.exchange import choose_exchange
from dance_jax.launch.planning.plan import (
    ModelFacts,
    Plan,
    Room,
    ServerPlan,
    model_notes,
    rooms,
    spare_notes,
    weights_note,
)
from dance_jax.launch.rebalance.workload import Statistics
from dance_jax.placement.core import Layout, Placement

#: In the directory that the user names.
FILE_NAME = "placement.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class ServiceState:
    """What is kept."""

    #: Names of the servers by rank, and the model's fingerprint.
    servers: tuple[str, ...]
    model: str
    layout: Layout
    statistics: Statistics

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes it; another one that is there is replaced at once, or not at all.

        Raises:
            OSError: it cannot be written.
        """
        arrays = {
            "servers": np.array(self.servers, np.str_),
            "model": np.array(self.model, np.str_),
            "layout": np.frombuffer(self.layout.to_bytes(), np.uint8),
            "counts": self.statistics.counts,
        }
        arrays |= {f"routes_{n}": route for n, route in enumerate(self.statistics.routes)}
        with whole_file(pathlib.Path(directory) / FILE_NAME) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    def misfit(self, spec: ClusterSpec, model: ModelFacts, held: Sequence[Room]) -> str:
        """Why it is of no use to these servers; "": it is."""
        if model.fingerprint and self.model != model.fingerprint:
            return "it is of another model"
        if self.servers != spec.names:
            return f"it is of servers {', '.join(self.servers)}"
        if (self.layout.devices, self.layout.slots_per_device) != (
            spec.devices,
            tuple(room.slots for room in held),
        ):
            return "the servers had other devices, or slots for experts"
        full = [
            spec.names[server]
            for server, room in enumerate(held)
            for device in range(room.devices)
            if room.spare and (self.layout.experts_of(server, device)[:, 0] >= 0).all()
        ]
        # A service that was interrupted in a migration has one spare slot left, if not all.
        return f"experts fill the spare slots of {full[0]}" if full else ""


def load(directory: str | os.PathLike[str]) -> ServiceState | None:
    """What was saved there; None: nothing.

    Raises:
        UserError: it cannot be read.
    """
    path = pathlib.Path(directory) / FILE_NAME
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            servers = tuple(str(name) for name in file["servers"])
            return ServiceState(
                servers,
                str(file["model"]),
                Layout.from_bytes(file["layout"].tobytes()),
                Statistics(file["counts"], tuple(file[f"routes_{n}"] for n in range(len(servers)))),
            )
    except Exception as error:  # a damaged file may lead zipfile and numpy anywhere
        raise UserError(f"{path}: not a readable state of a service ({error})") from error


def resumed_plan(
    spec: ClusterSpec, model: ModelFacts, config: EngineConfig, state: ServiceState
) -> Plan:
    """The plan that goes on where a service before ended."""
    placement, held = Placement(state.layout.resident), rooms(spec, model, config)
    counts = state.statistics.counts
    residents = placement.resident.sum(2).tolist()
    shares = placement.local_shares(counts).tolist()
    return Plan(
        spec=spec,
        policy="as before",
        placement=placement,
        layout=state.layout,
        servers=tuple(
            ServerPlan(**vars(room), resident=tuple(each), local_share=share)
            for room, each, share in zip(held, residents, shares, strict=True)
        ),
        local_share=placement.local_share(counts),
        expert_bytes=model.expert_bytes(config.dtype),
        weights=weights_note(model, config),
        exchange=choose_exchange(spec, model.config, config, placement.local_share(counts)),
        notes=(
            *model_notes(model.config, config),
            "Experts are where the service before had them.",
            *spare_notes(held, placement),
        ),
    )
