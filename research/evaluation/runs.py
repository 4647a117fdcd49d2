"""What an evaluation measured, kept in a file, so that it can be simulated again."""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from benchmarks.serving.setting import progress
from dance_jax.config import EngineConfig, UserError
from dance_jax.files import whole_file
from research.simulator import Model, Work

from .cells import Cell
from .predict import Machine, Measured, predictions
from .quota import TRIES, with_quotas


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """All of one evaluation.

    Attributes:
        names, devices: of the servers.
        cores: of each server by its quota; None: it has none.
        slots: of each device, spare ones left out.
        model: its sizes.
        config: of the engines.
        setup: what was asked for, as results have it.
        cells: what is reported of each run.
        measured: what the simulator has to know of it, in the same order.
    """

    names: tuple[str, ...]
    devices: tuple[int, ...]
    cores: tuple[float, ...] | None
    slots: int
    model: Model
    config: EngineConfig
    setup: dict[str, Any]
    cells: tuple[Cell, ...]
    measured: tuple[Measured, ...]
    #: By which `load` knows what another version wrote.
    fields: tuple[str, ...] = dataclasses.field(default_factory=lambda: _fields())

    @classmethod
    def load(cls, path: pathlib.Path) -> Runs:
        """What `save` wrote; like all pickles it has to come from a source that is trusted.

        Raises:
            UserError: it cannot be read, or is something else.
        """
        try:
            found = pickle.loads(path.read_bytes())
        except OSError as error:
            raise UserError(f"--runs: {path} cannot be read: {error.strerror}") from error
        except Exception as error:  # whatever a file that is no pickle makes of its reader
            raise UserError(f"--runs: {path} is not what --save-runs wrote: {error}") from error
        if not isinstance(found, cls) or getattr(found, "fields", None) != _fields():
            raise UserError(f"--runs: {path} is not what --save-runs of this version wrote")
        return found

    def save(self, path: pathlib.Path) -> None:
        """For `load`, by the same version of this program."""
        with whole_file(path) as file:
            pickle.dump(self, file)

    def simulated(self, console: Console) -> list[Cell]:
        """All runs again, with speeds that were measured in them."""
        measured = self.measured
        try:
            machine, fitted = Machine.fitted(
                measured, self.devices, self.slots, self.model, self.config
            )
        except UserError as error:
            console.print(f"nothing is simulated: {error}", soft_wrap=True)
            return list(self.cells)
        for one, name in zip(fitted, self.names, strict=True):
            console.print(f"{name}: {one.speed}; off by {one.error:.1%}", soft_wrap=True)
        if self.cores is not None:
            machine = self._with_quotas(machine, self.cores, console)
        with progress(console, "simulating runs", len(measured)) as done:
            found = predictions(machine, measured, done)
        return [
            dataclasses.replace(cell, predicted_s=seconds)
            for cell, seconds in zip(self.cells, found, strict=True)
        ]

    def _with_quotas(self, machine: Machine, cores: Sequence[float], console: Console) -> Machine:
        with progress(console, "looking for what quotas do", TRIES) as done:
            found, off = with_quotas(machine, self.measured, cores, done)
        for server, name, share in zip(found.servers, self.names, off, strict=True):
            console.print(
                f"{name}: a quota of {server.speed.quota:g} cores, of which "
                f"{1e3 * server.speed.burst:.1f} ms are kept; computing is off by {share:.1%}",
                soft_wrap=True,
            )
        return found


def _fields() -> tuple[str, ...]:
    """Of all that is kept."""
    classes = (Runs, Cell, Measured, Work)
    return tuple(f"{c.__name__}.{f.name}" for c in classes for f in dataclasses.fields(c))
