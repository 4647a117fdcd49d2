"""What all tests share: JAX on the CPU, and one cluster of three processes for the session."""

from __future__ import annotations

import os
import signal

os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Iterator

import pytest

from tests.cluster.fixture import TestCluster

# A shell's background job ignores Ctrl-C, and so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def three_servers() -> Iterator[TestCluster]:
    """Processes with 1, 1 and 2 devices; asserted by the processes when they join."""
    cluster = TestCluster()
    yield cluster
    cluster.close()
