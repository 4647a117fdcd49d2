"""docs/structure.md names every module, and no other."""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_every_module_has_a_line() -> None:
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    _, _, table = text.partition("## Modules")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([a-z_/]+)`", row)}
    package = ROOT / "dance_jax"
    modules = {
        str(path.relative_to(package).with_suffix("")).removesuffix("/__init__")
        for path in package.rglob("*.py")
    }
    # Packages are named by their parts.
    modules -= {"__init__", "placement", "models", "engine", "launch", "launch/preflight", "serve"}
    assert named == modules
