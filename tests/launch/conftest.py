"""Shared by tests of launches: the files of a tiny cluster, and launches that leave nothing."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.launch.cold_run import Tiny, cold_run
from tests.launch.launched import Launch


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, expert_library: pathlib.Path | None) -> Tiny:
    return cold_run(tmp_path_factory, expert_library)


@pytest.fixture
def launch(tiny: Tiny, tmp_path: pathlib.Path) -> Iterator[Any]:
    """Starts launches of the tiny cluster: launch(option, ...) -> Launch."""
    launches: list[Launch] = []

    def start(*options: str | os.PathLike[str]) -> Launch:
        launches.append(Launch(tiny.command(*options), tmp_path))
        return launches[-1]

    yield start
    for one in launches:
        one.kill()
