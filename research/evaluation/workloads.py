"""The servers, the tasks of their users, and where each policy puts experts."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from benchmarks.live.tasks import Task, read_task
from dance_jax.config import UserError
from dance_jax.placement import place
from dance_jax.placement.activations import Activations
from dance_jax.placement.core import Placement
from dance_jax.placement.cost import Cost
from dance_jax.placement.migration import halves
from dance_jax.placement.spare import reserve

#: Names and devices of the servers, as in the paper.
DEVICES = {"alpha": 1, "beta": 1, "gamma": 2}
#: The three tasks of BIG-bench that the paper's servers are asked for; tasks that differ more.
BIG_BENCH = ("abstract_narrative_understanding", "arithmetic", "ascii_word_recognition")
MULTI_DATA = ("code_line_description", "hindi_question_answering", "mmlu_pro_math")
#: Without --tasks: our own prompts.
OWN = {"own": ("code", "english", "german"), "others": ("math", "french", "english")}


@dataclasses.dataclass(frozen=True)
class Workload:
    """Attributes:
    name: as on the command line.
    tasks: of each server.
    """

    name: str
    tasks: tuple[Task, ...]

    def on(self, servers: int) -> Workload:
        """The workload of this many servers, to which the tasks are given in turn."""
        return Workload(self.name, tuple(itertools.islice(itertools.cycle(self.tasks), servers)))


def read_workloads(directory: pathlib.Path | None, examples: pathlib.Path) -> list[Workload]:
    """
    Args:
        directory: with NAME.jsonl of all tasks; None: our own prompts.
        examples: where those are.

    Raises:
        UserError: a task is missing, or cannot be read.
    """
    if directory is None:
        named, pattern, where = OWN, "{}.heldout.jsonl", examples
    else:
        named = {"big-bench": BIG_BENCH, "multidata": MULTI_DATA}
        pattern, where = "{}.jsonl", directory
    return [
        Workload(name, tuple(read_task(where / pattern.format(task)) for task in tasks))
        for name, tasks in named.items()
    ]


def hosts_text(experts: int, memory: float, hosts: int | None = None) -> str:
    """A hosts file whose servers hold `memory` times the experts, each device about the same.

    Spare slots, by which placements are swapped, come on top.

    Args:
        experts: of all layers.
        hosts: how many, of one device each; None: the paper's three.

    Raises:
        UserError: it is too little for all experts.
    """
    if memory < 1:
        raise UserError(f"--memory {memory:g}: at least 1 is needed, so that all experts live")
    devices = DEVICES if hosts is None else {f"host{n}": 1 for n in range(1, hosts + 1)}
    held = math.ceil(round(experts * memory) / sum(devices.values()))
    slots = next(slots for slots in itertools.count(held) if slots - reserve(slots) == held)
    lines = (f"{name} address=localhost devices={n} experts={slots}" for name, n in devices.items())
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Placed:
    """A policy's placement, and what it promises.

    Attributes:
        policy: its name.
        placement: fitted to one half of the tokens.
        busiest, load, concentration: on the other half, see `placement.metrics.Traffic`.
    """

    policy: str
    placement: Placement
    busiest: float
    load: float
    concentration: float


def placed(
    policy: str, activations: Activations, devices: Sequence[int], slots: int, cost: Cost, seed: int
) -> Placed:
    """Args:
    activations: of the workload, servers in the order of `devices`.
    slots: of each device, spare ones left out.
    cost: for policies that ask for it.
    """
    fit, judge = halves(activations.routes)
    found = place(
        policy,
        # Of all tokens: how many each server has is in them, and in no sample of equal size.
        activations.counts,
        slots * np.asarray(devices),
        routes=fit,
        devices=devices,
        cost=cost,
        seed=seed,
    )
    traffic = found.traffic(judge)
    return Placed(policy, found, traffic.busiest, traffic.load(devices), traffic.concentration())
