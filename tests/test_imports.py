"""Imports point in one direction, given by ORDER."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "dance_jax"
#: Modules and packages; each may import those before it. The longest matching name counts.
ORDER = (
    "config",
    "cache",
    "files",
    "memory",
    "signals",
    "descriptors",
    "logs",
    "placement",
    "models",
    "engine",
    "launch.control",
    "launch.planning",
    "launch.agent",
    "launch.preflight",
    "launch.worker",
    "serve",
    "launch.rebalance",
    "launch.cluster",
    "launch.cli",
    "launch",
    "backends",
    "llm",
    "bench",
    "command",
)


def place(module: str) -> int | None:
    """Index of a module of this package in ORDER. None if ORDER does not cover the module."""
    parts = module.split(".")[1:]
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in ORDER:
            return ORDER.index(name)
    return None


def name_of(path: pathlib.Path) -> str:
    """The module name of a file of the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("dance_jax", *(part for part in parts if part != "__init__")))


def imported(path: pathlib.Path) -> list[tuple[int, str]]:
    """(line, module) of every import of this package in a file, including imports in functions.

    A string that is the name of a module counts as an import, because a process may be started with
    it.
    """
    found = []
    package = ["dance_jax", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # In `from dance_jax.launch import x`, x may be a module.
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif (
            isinstance(node, ast.Constant)
            and re.fullmatch(r"dance_jax(\.\w+)+", str(node.value))
            and place(str(node.value)) is not None
        ):
            found.append((node.lineno, str(node.value)))
    return [(line, name) for line, name in found if name.split(".")[0] == "dance_jax"]


def backwards(path: pathlib.Path) -> list[str]:
    """Imports in a file that point to a later layer."""
    own = place(name_of(path))
    wrong = []
    for line, module in imported(path):
        target = place(module)
        if target is None:
            wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {module} has no place in the order")
        elif own is None or target > own:
            wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {name_of(path)} imports {module}")
    return wrong


def test_no_import_points_backwards() -> None:
    # dance_jax/__init__.py offers LLM lazily, so the file stands above everything.
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert {place(name_of(path)) for path in files} == set(range(len(ORDER)))
    assert [wrong for path in files for wrong in backwards(path)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import dance_jax.engine.runner",
        "from dance_jax.engine import runner",
        "from dance_jax import engine",
        "from ..engine import runner",
        "def f():\n    from dance_jax.launch.planning.plan import Plan",
        "from dance_jax import somewhere",
        "MODULE = 'dance_jax.launch.worker.main'",
    ],
)
def test_the_test_would_notice(
    line: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "models" / "new.py"
    path.parent.mkdir()
    path.write_text(line)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert backwards(path)


@pytest.mark.parametrize(
    "module",
    [
        "dance_jax",
        "dance_jax.config",
        "dance_jax.launch.worker.main",
        "dance_jax.launch.planning.hosts",
        "dance_jax.bench.main",
        "dance_jax.serve.app",
        "dance_jax.serve.frontend",
        "dance_jax.serve.http_server",
    ],
)
def test_no_jax_where_it_only_costs_time(module: str) -> None:
    """A worker reports that it lives, and watches its parent, before the slow import of JAX; a
    front end never needs it."""
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
