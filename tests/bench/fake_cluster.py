"""Clusters of fake servers, which the benchmark starts."""

from __future__ import annotations

import pathlib
import sys

import psutil
import pytest

from dance_jax.bench import cluster

ROOT = pathlib.Path(__file__).parents[2]
#: A hosts file of two servers of this machine, with 1 and 2 devices.
HOSTS = "alpha devices=1 experts=4 address=localhost\nbeta devices=2 experts=4 address=localhost\n"
MODULE = "tests.bench.fake_launcher"


def replace_launcher(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let a cluster be `count` fake servers."""
    monkeypatch.setattr(cluster, "LAUNCHER", (sys.executable, "-m", MODULE, str(count)))


def children() -> list[psutil.Process]:
    """Launchers that this process started and that still run."""
    mine = psutil.Process().children(recursive=True)
    return [each for each in mine if MODULE in each.cmdline()]
