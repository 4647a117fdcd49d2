"""Imports point one way: the order of ORDER."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "dance_jax"
ORDER = (
    "config",
    "cache",
    "files",
    "memory",
    "placement",
    "models",
    "engine",
    "launch",
    "serve",
    "backends",
    "llm",
)


def layer(module: str) -> str:
    """Second part of a module's name: its place in ORDER; "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imported(path: pathlib.Path) -> list[tuple[int, str]]:
    """(line, module) of every import of this package in a file, also inside functions."""
    found = []
    package = ["dance_jax", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from dance_jax import x` may name a module.
            names = [f"{module}.{alias.name}" for alias in node.names]
            found += [
                (node.lineno, name) for name in (names if module == "dance_jax" else [module])
            ]
    return [(line, name) for line, name in found if name.split(".")[0] == "dance_jax"]


def backwards(path: pathlib.Path) -> list[str]:
    """Imports of a file that point to a later layer."""
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    wrong = []
    for line, module in imported(path):
        target = layer(module)
        if target in ORDER and ORDER.index(target) > ORDER.index(own):
            wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {own} imports {module}")
        elif target not in ORDER:
            wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {module} has no place in the order")
    return wrong


def test_no_import_points_backwards() -> None:
    # dance_jax/__init__.py offers LLM lazily: it stands above everything.
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in files} >= set(ORDER)
    assert [wrong for path in files for wrong in backwards(path)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import dance_jax.engine.runner",
        "from dance_jax.engine import runner",
        "from dance_jax import engine",
        "from ..engine import runner",
        "def f():\n    from dance_jax.launch.plan import Plan",
        "from dance_jax import somewhere",
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
    "module", ["dance_jax", "dance_jax.config", "dance_jax.launch.worker", "dance_jax.launch.hosts"]
)
def test_no_jax_before_a_worker_has_its_setup(module: str) -> None:
    """A worker says that it lives, and watches its parent, before the slow import begins."""
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
