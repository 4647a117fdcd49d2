"""Files that an installed package contains beside its Python files."""

from __future__ import annotations

import pathlib
import tomllib

ROOT = pathlib.Path(__file__).parents[1]


def test_every_file_of_the_package_is_installed() -> None:
    """Most of all the C++ sources: they are compiled where the package is used."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    package = ROOT / "dance_jax"
    patterns = project["tool"]["setuptools"]["package-data"]["dance_jax"]
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    there = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".so")
    }
    assert there == installed
    assert any(path.suffix == ".cc" for path in installed)
