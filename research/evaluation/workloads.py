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
from dance_jax.placement.activations import Activations
from dance_jax.placement.core import Placement
from dance_jax.placement.cost import Cost
from dance_jax.placement.migration import halves
from dance_jax.placement.policies import place
from dance_jax.placement.spare import reserve

#: Names and devices of the servers, as in the paper.
DEVICES = {"alpha": 1, "beta": 1, "gamma": 2}
#: The paper's three tasks, from BIG-bench; and three tasks that differ more.
BIG_BENCH = ("abstract_narrative_understanding", "arithmetic", "ascii_word_recognition")
MULTI_DATA = ("code_line_description", "hindi_question_answering", "mmlu_pro_math")
#: Our own prompts, used without --tasks.
OWN = {"own": ("code", "english", "german"), "others": ("math", "french", "english")}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What the users of all servers ask for.

    Attributes:
        name: as on the command line.
        tasks: the task of each server.
    """

    name: str
    tasks: tuple[Task, ...]

    def on(self, servers: int) -> Workload:
        """The workload of `servers` servers, which get the tasks in turn."""
        return Workload(self.name, tuple(itertools.islice(itertools.cycle(self.tasks), servers)))


def read_workloads(directory: pathlib.Path | None, examples: pathlib.Path) -> list[Workload]:
    """Reads all workloads.

    Args:
        directory: with NAME.jsonl of all tasks; None for our own prompts.
        examples: the directory of our own prompts.

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
    """A hosts file whose servers hold `memory` times the experts, with equal devices.

    Spare slots, by which placements are swapped, come on top.

    Args:
        experts: number of experts of all layers.
        memory: of all servers together.
        hosts: number of hosts, with one device each; None for the paper's three.

    Raises:
        UserError: the memory is too small for all experts.
    """
    if memory < 1:
        raise UserError(f"--memory {memory:g}: at least 1 is needed to hold all experts")
    devices = DEVICES if hosts is None else {f"host{n}": 1 for n in range(1, hosts + 1)}
    held = math.ceil(round(experts * memory) / sum(devices.values()))
    slots = next(slots for slots in itertools.count(held) if slots - reserve(slots) == held)
    lines = (f"{name} address=localhost devices={n} experts={slots}" for name, n in devices.items())
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Placed:
    """A policy's placement, and its predicted metrics.

    Attributes:
        policy: the name of the policy.
        placement: fitted to one half of the tokens.
        busiest, load, concentration: on the other half, see `placement.measures.Traffic`.
    """

    policy: str
    placement: Placement
    busiest: float
    load: float
    concentration: float


def placed(
    policy: str, activations: Activations, devices: Sequence[int], slots: int, cost: Cost, seed: int
) -> Placed:
    """Places experts with a policy, and predicts its metrics.

    Args:
        policy: a name in `placement.POLICIES`.
        activations: of the workload, servers in the order of `devices`.
        devices: of each server.
        slots: slots of each device, without spare ones.
        cost: for policies that weigh it.
        seed: for policies that draw at random.
    """
    fit, judge = halves(activations.routes)
    found = place(
        policy,
        # Counts of all tokens say how many each server has; samples of equal size would not.
        activations.counts,
        slots * np.asarray(devices),
        routes=fit,
        devices=devices,
        cost=cost,
        seed=seed,
    )
    traffic = found.traffic(judge)
    return Placed(policy, found, traffic.busiest, traffic.load(devices), traffic.concentration())
