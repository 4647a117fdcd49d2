"""The state that a service saves for the next one: the layout and the expert statistics."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from dance_jax.config import ClusterSpec, EngineConfig, UserError
from dance_jax.files import whole_file
from dance_jax.launch.planning.exchange import choose_exchange, exchange_notes
from dance_jax.launch.planning.plan import (
    ModelFacts,
    Plan,
    Room,
    ServerPlan,
    loss_notes,
    model_notes,
    rooms,
    spare_notes,
    weights_note,
)
from dance_jax.launch.rebalance.workload import Statistics
from dance_jax.placement.core import Layout, Placement

#: Name of the file in the user's --state-dir.
FILE_NAME = "placement.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class ServiceState:
    """The saved state."""

    #: Names of the servers by rank, "" for vacant seats; fingerprint of the model.
    servers: tuple[str, ...]
    model: str
    #: Where experts are when no server is lost.
    layout: Layout
    statistics: Statistics

    def of(self, servers: Sequence[int]) -> ServiceState:
        """The state of some of the servers, in this order."""
        counts, routes = self.statistics.counts, self.statistics.routes
        return ServiceState(
            tuple(self.servers[n] for n in servers),
            self.model,
            self.layout.of(servers),
            Statistics(counts[[*servers]], tuple(routes[n] for n in servers)),
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the state; an existing file is replaced at once or not at all.

        Raises:
            OSError: the file cannot be written.
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

    def misfit(
        self, spec: ClusterSpec, model: ModelFacts, held: Sequence[Room], survive: int = 0
    ) -> str:
        """Why the state does not fit these servers and `--survive`; "" if it fits."""
        if model.fingerprint and self.model != model.fingerprint:
            return "it is of another model"
        if self.servers != spec.names:
            return f"it is of the servers {', '.join(self.servers)}"
        if (self.layout.devices, self.layout.slots_per_device) != (
            spec.devices,
            tuple(room.slots for room in held),
        ):
            return "the servers had other devices, or another number of expert slots"
        if short := int(Placement(self.layout.resident).short(survive + 1).sum()):
            return (
                f"{short} experts have fewer than the {survive + 1} holders of --survive {survive}"
            )
        full = [
            spec.names[server]
            for server, room in enumerate(held)
            for device in range(room.devices)
            if room.spare and (self.layout.experts_of(server, device)[:, 0] >= 0).all()
        ]
        # After an interrupted migration, at least one spare slot is free, if not all of them.
        return f"experts fill the spare slots of {full[0]}" if full else ""


def load(directory: str | os.PathLike[str]) -> ServiceState | None:
    """Load a saved state; None if there is none.

    Raises:
        UserError: the file cannot be read.
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
    except Exception as error:  # on a damaged file, zipfile and numpy may raise anything
        raise UserError(f"{path}: is not a readable state of a service: {error}") from error


def resumed_plan(
    spec: ClusterSpec,
    model: ModelFacts,
    config: EngineConfig,
    state: ServiceState,
    survive: int = 0,
) -> Plan:
    """A plan with the placement of a previous service; see `ServiceState.misfit`."""
    layout = dataclasses.replace(state.layout, holders=survive + 1)
    placement, held = Placement(layout.resident), rooms(spec, model, config, survive)
    counts = state.statistics.counts
    exchange = choose_exchange(spec, model.config, config, placement.local_share(counts), survive)
    residents = placement.resident.sum(2).tolist()
    shares = placement.local_shares(counts).tolist()
    return Plan(
        spec=spec,
        policy="as before",
        placement=placement,
        layout=layout,
        servers=tuple(
            ServerPlan(**vars(room), resident=tuple(each), local_share=share)
            for room, each, share in zip(held, residents, shares, strict=True)
        ),
        local_share=placement.local_share(counts),
        expert_bytes=model.expert_bytes(config.dtype),
        weights=weights_note(model, config),
        exchange=exchange,
        notes=(
            *model_notes(model.config, config),
            "Experts are placed as in the previous service.",
            *spare_notes(held, placement),
            *exchange_notes(exchange, len(spec.servers)),
            *loss_notes(layout, exchange, spec, counts, model, config),
        ),
    )
