"""Measure how soon survivors are told what to load after a loss: `python research/recovery.py`.

The time is processor time of the launcher: from the loss of a server until the first batch is sent
to the last survivor. Experts are placed at random, replicas as well, and every server has four
empty slots.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
import time
import types
from typing import Any, cast

# Run as a script, only this folder would be searched.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
from rich.console import Console
from rich.table import Table

from dance_jax.bench.arguments import add_seed, count
from dance_jax.config import EngineConfig, RebalanceOptions
from dance_jax.launch.control import protocol
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.launch.rebalance.controller import Rebalancer
from dance_jax.placement.core import Layout, Placement
from dance_jax.placement.devices import spread

#: Servers, layers, experts of a layer, and bytes of an expert.
SHAPES = (
    (3, 12, 64, 400_000),
    (3, 61, 256, 44_000_000),
    (5, 61, 256, 44_000_000),
    (8, 61, 256, 44_000_000),
)
#: Copies of an expert that each server holds on average beside the first one, over the servers.
REPLICAS = (0.02, 0.3)
#: Empty slots of each server.
EMPTY = 4


class Service:
    """Servers that are sent commands; the first one is lost."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.gone, self.epoch = layout, frozenset[int](), 1
        self.present = frozenset(range(len(layout.devices)))
        self.stages: list[protocol.Stage] = []
        self.told_at = 0.0

    def tell(self, rank: int, command: Any) -> None:
        protocol.encode(command)
        if isinstance(command, protocol.Stage):
            self.stages.append(command)
            self.told_at = time.process_time()

    def tell_all(self, command: Any) -> None:
        protocol.encode(command)

    def restart(self, rank: int, why: str) -> None:
        raise RuntimeError(why)

    def notice(self, name: str, text: str) -> None:
        pass


def measured(shape: tuple[int, int, int, int], replicas: float, seed: int) -> tuple[float, int]:
    """Processor seconds until survivors have their first batch, and experts to load."""
    servers, layers, experts, size = shape
    random = np.random.default_rng(seed)
    resident = random.random((servers, layers, experts)) < replicas
    resident[random.integers(servers, size=(layers, experts)), *np.indices((layers, experts))] = 1
    slots = [int(held) + EMPTY for held in resident.sum((1, 2))]
    service = Service(spread(Placement(resident), [1] * servers, slots))
    config = types.SimpleNamespace(top_k=8)
    facts = types.SimpleNamespace(config=config, fingerprint="", expert_bytes=lambda dtype: size)
    hosts = "\n".join(f"server{n} address=localhost experts=1" for n in range(servers))
    rebalancer = Rebalancer(
        RebalanceOptions(interval_s=0.0),
        parse_hosts(hosts),
        cast(Any, facts),
        EngineConfig(max_model_len=64),
        service,
    )
    rebalancer.tick()
    service.present -= {0}
    began = time.process_time()
    rebalancer.engines_died([0])
    rebalancer.tick()
    rebalancer.close()
    lost = int((~resident[1:].any(0)).sum())
    assert {load.holder for stage in service.stages for load in stage.loads} == {-1}
    return service.told_at - began, lost


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python research/recovery.py", description=__doc__)
    parser.add_argument("--repeat", type=count, default=5, help="losses per line (%(default)s)")
    add_seed(parser, "of placements")
    return parser


def main() -> None:
    """Print a table."""
    arguments = parser().parse_args()
    table = Table("servers", "layers", "experts", "replicas", "lost", "median ms", "longest ms")
    for shape in SHAPES:
        for replicas in REPLICAS:
            runs = [
                measured(shape, replicas, arguments.seed + run) for run in range(arguments.repeat)
            ]
            ms = [1000 * seconds for seconds, _ in runs]
            figures = (f"{replicas:g}", str(runs[0][1]), f"{statistics.median(ms):.1f}")
            table.add_row(*map(str, shape[:3]), *figures, f"{max(ms):.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
