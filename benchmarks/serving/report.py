"""All results of benchmarks/serve.py, their targets, and their JSON file."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from benchmarks.targets import Target, plain_targets
from dance_jax.bench.client import Answer
from dance_jax.bench.figures import Figures
from dance_jax.bench.report import plain_load, write_json

from . import idle, long, prefix, soak, static

SECTIONS = ("idle", "static", "long", "prefix", "soak")


@dataclasses.dataclass
class Results:
    """Results of a run under load, or of sections; None if not measured."""

    #: Answers of a run under load.
    answers: list[Answer] | None = None
    #: Figures of the run under load.
    load: list[Figures] | None = None
    idle: idle.Idle | None = None
    static: static.Static | None = None
    long: list[long.Row] | None = None
    prefix: prefix.Prefix | None = None
    soak: soak.Soak | None = None

    def targets(self) -> list[Target]:
        """Return the targets of all sections."""
        return [
            *idle.targets(self.idle),
            *static.targets(self.static),
            *long.targets(self.long),
            *prefix.targets(self.prefix),
            *soak.targets(self.soak),
        ]


def write(path: pathlib.Path, setup: dict[str, Any], results: Results) -> None:
    """Write results as a JSON file; see `write_json`."""
    plain: dict[str, Any] = {} if results.load is None else plain_load(results.load)
    for section in SECTIONS:
        if (found := getattr(results, section)) is not None:
            plain[section] = _plain(found)
    write_json(path, setup, plain | plain_targets(results.targets()))


def _plain(found: Any) -> Any:
    if isinstance(found, list):
        return [_plain(each) for each in found]
    return dataclasses.asdict(found)
