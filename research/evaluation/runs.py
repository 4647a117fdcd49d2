"""A file with what an evaluation measured, so that it can be simulated again."""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from dance_jax.bench.terminal import progress
from dance_jax.config import EngineConfig, UserError
from dance_jax.files import whole_file
from research.simulator import Model, Work

from .cells import Cell
from .predict import Machine, Measured, predictions
from .quota import TRIES, with_quotas


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """All runs of one evaluation.

    Attributes:
        names, devices: of the servers.
        cores: the quota of each server; None without quotas.
        slots: slots of each device, without spare ones.
        model: sizes of the model.
        config: of the engines.
        setup: the options and the machine, as in the results.
        cells: the reported figures of each run.
        measured: what the simulator needs to know of each run, in the same order.
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
    #: Lets `load` recognise files of another version.
    fields: tuple[str, ...] = dataclasses.field(default_factory=lambda: _fields())

    @classmethod
    def load(cls, path: pathlib.Path) -> Runs:
        """Reads what `save` wrote. It is a pickle: load only files from a source that you trust.

        Raises:
            UserError: the file cannot be read, or is something else.
        """
        try:
            found = pickle.loads(path.read_bytes())
        except OSError as error:
            raise UserError(f"--runs: {path} cannot be read: {error.strerror}") from error
        except Exception as error:  # a file that is not a pickle can raise anything
            raise UserError(f"--runs: {path} is not what --save-runs wrote: {error}") from error
        if not isinstance(found, cls) or getattr(found, "fields", None) != _fields():
            raise UserError(f"--runs: {path} is not what --save-runs of this version wrote")
        return found

    def save(self, path: pathlib.Path) -> None:
        """Writes a file for `load`, of the same version of this program."""
        with whole_file(path) as file:
            pickle.dump(self, file)

    def simulated(self, console: Console) -> list[Cell]:
        """The cells with the latencies that the simulator predicts; unchanged if it cannot."""
        measured = self.measured
        try:
            machine, fitted = Machine.fitted(
                measured, self.devices, self.slots, self.model, self.config
            )
        except UserError as error:
            console.print(f"the runs are not simulated: {error}", soft_wrap=True)
            return list(self.cells)
        for one, name in zip(fitted, self.names, strict=True):
            console.print(f"{name}: {one.speed}; error {one.error:.1%}", soft_wrap=True)
        if self.cores is not None:
            machine = self._with_quotas(machine, self.cores, console)
        with progress(console, "simulating runs", len(measured)) as done:
            found = predictions(machine, measured, done)
        return [
            dataclasses.replace(cell, predicted_s=seconds)
            for cell, seconds in zip(self.cells, found, strict=True)
        ]

    def _with_quotas(self, machine: Machine, cores: Sequence[float], console: Console) -> Machine:
        with progress(console, "fitting the effect of quotas", TRIES) as done:
            found, off = with_quotas(machine, self.measured, cores, done)
        for server, name, share in zip(found.servers, self.names, off, strict=True):
            console.print(
                f"{name}: a quota of {server.speed.quota:g} cores, of which "
                f"{1e3 * server.speed.burst:.1f} ms can be saved; error of computing {share:.1%}",
                soft_wrap=True,
            )
        return found


def _fields() -> tuple[str, ...]:
    """The names of all fields in a file."""
    classes = (Runs, Cell, Measured, Work)
    return tuple(f"{c.__name__}.{f.name}" for c in classes for f in dataclasses.fields(c))
