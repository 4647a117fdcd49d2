"""All results of benchmarks/serve.py, their targets, and their JSON file."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
from collections.abc import Iterable
from typing import Any

from benchmarks.targets import Target
from dance_jax.files import whole_file

from . import idle, long, prefix, soak, static
from .client import Answer
from .figures import Figures

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


def machine() -> dict[str, Any]:
    """Describe the machine that the figures depend on."""
    return {"cores": os.cpu_count(), "system": platform.platform(), "processor": _processor()}


def _processor() -> str:
    """Return the processor's name: from /proc/cpuinfo if possible."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def write(path: pathlib.Path, setup: dict[str, Any], results: Results) -> None:
    """Write results as a JSON file; see `write_json`."""
    plain: dict[str, Any] = {}
    if results.load is not None:
        plain["load"] = [_figures(each) for each in results.load]
    for section in SECTIONS:
        if (found := getattr(results, section)) is not None:
            plain[section] = _plain(found)
    write_json(path, setup, plain, results.targets())


def write_json(
    path: pathlib.Path, setup: dict[str, Any], found: dict[str, Any], targets: Iterable[Target]
) -> None:
    """Write a JSON file, which appears complete or not at all.

    Args:
        path: of the file.
        setup: the command line's options.
        found: results by section.
        targets: of the results; targets that were not measured are omitted.
    """
    options = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in setup.items()}
    plain = {"machine": machine(), "setup": options, **found}
    plain["targets"] = [
        dataclasses.asdict(target) | {"missed": target.missed}
        for target in targets
        if target.worst is not None
    ]
    with whole_file(path) as file:
        file.write((json.dumps(_finite(plain), indent=1, allow_nan=False) + "\n").encode())


def _figures(figures: Figures) -> dict[str, Any]:
    rates = {
        name: getattr(figures, name) for name in ("output_rate", "prompt_rate", "request_rate")
    }
    return dataclasses.asdict(figures) | rates


def _plain(found: Any) -> Any:
    if isinstance(found, list):
        return [_plain(each) for each in found]
    return dataclasses.asdict(found)


def _finite(value: Any) -> Any:
    """Replace infinite and NaN numbers by text, because JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value
