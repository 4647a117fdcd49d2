"""Runs preflights for tests, without the checks that a test does not need."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from dance_jax.config import ClusterSpec
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.launch.preflight.report import print_preflight
from dance_jax.launch.preflight.run import Preflight, run_preflight

LOCAL = """\
alpha address=127.0.0.1 experts=5
beta address=127.0.0.2 experts=5
gamma address=127.0.0.3 experts=5 devices=2
"""


def run(hosts: str | ClusterSpec, **options: Any) -> Preflight:
    spec = parse_hosts(hosts) if isinstance(hosts, str) else hosts
    known: dict[str, Any] = {
        "model": None,
        "fingerprint": "",
        "cache_dir": None,
        "needs": [1 << 20] * len(spec.servers),
    }
    return run_preflight(spec, **(known | options))


def text(found: Preflight, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    print_preflight(console, found)
    return console.export_text()
