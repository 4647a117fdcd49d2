"""docs/structure.md names every module, and no other; docs/add-a-model.md shows what is there."""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_every_module_has_a_line() -> None:
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    _, _, table = text.partition("## Modules")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([a-z0-9_/]+)`", row)}
    package = ROOT / "dance_jax"
    modules = {
        str(path.relative_to(package).with_suffix("")).removesuffix("/__init__")
        for path in package.rglob("*.py")
    }
    # Packages are named by their parts.
    modules -= {"__init__", "placement", "models", "engine", "launch", "launch/preflight", "serve"}
    assert named == modules


def test_the_example_of_a_family_is_the_real_one() -> None:
    text = (ROOT / "docs" / "add-a-model.md").read_text(encoding="utf-8")
    families = ROOT / "dance_jax" / "models" / "families"
    example, line, names = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert example == (families / "olmoe.py").read_text(encoding="utf-8")
    assert line in (families / "__init__.py").read_text(encoding="utf-8")
    assert names in (families / "mixtral.py").read_text(encoding="utf-8")
