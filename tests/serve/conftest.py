"""One running cluster for the whole session, and the HTTP API on a scripted queue."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from dance_jax.serve.app import ServeInfo
from tests.launch.cold_run import Tiny, cold_run
from tests.serve.scripted import ScriptedQueue, client, serve_info
from tests.serve.served import Served, serving


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, expert_library: pathlib.Path | None) -> Tiny:
    return cold_run(tmp_path_factory, expert_library)


@pytest.fixture(scope="session")
def served(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three local servers with a tiny model; tests may kill engines, but not front ends."""
    folder = tmp_path_factory.mktemp("served")
    with serving(tiny, folder, "--log-dir", folder / "logs") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ServeInfo:
    return serve_info(tmp_path_factory.mktemp("model"))


@pytest.fixture
def queue() -> ScriptedQueue:
    return ScriptedQueue()


@pytest.fixture
def http(queue: ScriptedQueue, info: ServeInfo) -> TestClient:
    return client(queue, info)
