"""Shared by all tests: JAX on the CPU, and one cluster of three processes for the session."""

from __future__ import annotations

import gc
import os
import pathlib
import shutil
import signal
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Iterator

import pytest
from hypothesis import settings

from dance_jax.models import native
from tests.cluster.fixture import TestCluster
from tests.quick import XLA_FLAGS
from tests.schedule import Schedule, longest_first

os.environ["XLA_FLAGS"] = XLA_FLAGS
# Otherwise each of the many processes that tests start would compile all sources for seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# No timed tests: on a busy machine an example may take long. Every run tries other examples.
settings.register_profile("suite", deadline=None, max_examples=30)
settings.load_profile("suite")
# Background jobs of a shell ignore Ctrl-C, and so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Schedule | None:
    return Schedule(config, log) if config.option.dist == "loadfile" else None


@pytest.fixture(scope="module", autouse=True)
def collected() -> None:
    """Keeps the collector from scanning what earlier modules left, mostly compiled code."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def expert_library() -> pathlib.Path | None:
    """The C++ library, registered in this process. None without a compiler.

    It is kept where `make` builds it, so the next session finds it unless the sources change.
    """
    # One process builds; the others wait.
    library = native.build(native.INSTALLED)
    assert (library is None) == (shutil.which(os.environ.get("CXX", "c++")) is None)
    native.register(library)
    return library


@pytest.fixture(scope="session")
def compiled(expert_library: pathlib.Path | None) -> pathlib.Path:
    """`expert_library`, for tests that need the C++ library."""
    assert expert_library is not None, "this test needs a C++ compiler: c++ or $CXX"
    return expert_library


@pytest.fixture(scope="session")
def three_servers(expert_library: pathlib.Path | None) -> Iterator[TestCluster]:
    """Processes with 1, 1 and 2 devices, which assert their device counts when they join."""
    cluster = TestCluster(expert_library)
    yield cluster
    cluster.close()
