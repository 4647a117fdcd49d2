"""Results as a JSON file."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
from collections.abc import Iterable
from typing import Any

from dance_jax.bench.figures import Figures
from dance_jax.files import whole_file


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


def write_json(path: pathlib.Path, setup: dict[str, Any], found: dict[str, Any]) -> None:
    """Write a JSON file, which appears complete or not at all.

    Args:
        path: of the file.
        setup: the command line's options.
        found: results by section.
    """
    options = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in setup.items()}
    everything = {"machine": machine(), "setup": options, **found}
    with whole_file(path) as file:
        file.write((json.dumps(_finite(everything), indent=1, allow_nan=False) + "\n").encode())


def plain_load(rows: Iterable[Figures]) -> dict[str, Any]:
    """Return figures and rates of each server as the entry of a run under load in a JSON file."""
    rates = ("output_rate", "prompt_rate", "request_rate")
    return {
        "load": [
            dataclasses.asdict(row) | {name: getattr(row, name) for name in rates} for row in rows
        ]
    }


def _finite(value: Any) -> Any:
    """Replace infinite and NaN numbers by text, because JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value
