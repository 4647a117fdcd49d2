"""The cells of the evaluation, and rows: cells that differ only in their seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.live.watch import COMPUTING, PARTS, Watched
from dance_jax.placement.cost import staggered_share

from .workloads import Placed

#: Quantiles of Student's t for a two-sided 95 % interval, by the number of values.
_T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


@dataclasses.dataclass(frozen=True)
class Cell:
    """Figures of one run: a workload, rate, policy and seed.

    Attributes:
        rate: bits per second of every link; None if links are not shaped.
        latency_s: latency of each whole answer.
        failed: number of answers that are not whole.
        expert_calls: expert calls of the tokens of all servers.
        remote, any_miss, transfers: means over servers; see `research.evaluation`.
        busiest, load: as predicted.
        apart: share of hidden states that were sent while only one server had tokens, see
            `placement.cost.staggered_share`.
        wire_bytes: bytes sent through each host's interface.
        bound_bytes: the bound of all hosts, each byte counted once.
        steps: steps of the mean server.
        tokens: tokens that all servers computed.
        seconds: seconds of the mean server's steps, by part.
        wall_s: length of the run.
    """

    workload: str
    rate: int | None
    policy: str
    seed: int
    latency_s: list[float]
    failed: int
    expert_calls: float
    remote: float
    any_miss: float
    transfers: float
    busiest: float
    load: float
    apart: float
    wire_bytes: list[float]
    bound_bytes: float
    steps: float
    tokens: float
    seconds: dict[str, float]
    wall_s: float
    #: Mean latency according to the simulator; None if the run was not simulated.
    predicted_s: float | None = None

    @property
    def key(self) -> tuple[str, int | None, str]:
        """The key that cells share if they differ only in their seed."""
        return self.workload, self.rate, self.policy

    @property
    def bytes_ratio(self) -> float:
        """Bytes that the interfaces counted, over the bound."""
        return sum(self.wire_bytes) / self.bound_bytes if self.bound_bytes else float("nan")

    @property
    def computing_s(self) -> float:
        """Seconds of computing in the mean server's steps."""
        return sum(self.seconds[part] for part in COMPUTING)

    @property
    def step_s(self) -> float:
        """Seconds of the mean server's steps, waiting included."""
        return sum(self.seconds.values())

    @property
    def utilisation(self) -> float:
        """Share of the run in which the mean server was in a step."""
        return self.step_s / self.wall_s


def cell_of(
    run: Watched, placed: Placed, workload: str, rate: int | None, seed: int, layers: int, row: int
) -> Cell:
    """The figures of a run.

    Args:
        run: samples and answers.
        placed: the placement in force.
        workload, rate, seed: of the run.
        layers: MoE layers of the model.
        row: bytes of a hidden state, there and back.
    """
    first, last = run.samples[0], run.samples[-1]

    def spent(name: str) -> np.ndarray:
        return np.subtract(getattr(last, name), getattr(first, name))

    def per_token_and_layer(name: str) -> float:
        return float(np.mean(spent(name) / np.maximum(spent("tokens") * layers, 1)))

    complete = [answer for answer in run.answers if answer.complete]
    return Cell(
        workload=workload,
        rate=rate,
        policy=placed.policy,
        seed=seed,
        latency_s=[answer.end_s - answer.due_s for answer in complete],
        failed=len(run.answers) - len(complete),
        expert_calls=float((spent("local") + spent("remote")).sum()),
        remote=run.remote_share(0.0),
        any_miss=per_token_and_layer("away"),
        transfers=per_token_and_layer("transfers"),
        busiest=placed.busiest,
        load=placed.load,
        apart=staggered_share(
            float(spent("busiest")[0] / max(spent("transfers").sum(), 1)), placed.concentration
        ),
        wire_bytes=spent("wire").tolist(),
        bound_bytes=float(spent("transfers").sum() * row),
        steps=float(spent("steps").mean()),
        tokens=float(spent("tokens").sum()),
        seconds={
            part: float(np.subtract(last.seconds[part], first.seconds[part]).mean())
            for part in PARTS
        },
        wall_s=last.at_s - first.at_s,
    )


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of a figure over seeds, and half of its 95 % interval; None with one seed."""

    value: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        found = np.asarray(values, float)
        if len(found) < 2:
            return cls(float(found.mean()), None)
        t95 = _T95.get(len(found), 1.96)
        return cls(float(found.mean()), float(t95 * found.std(ddof=1) / np.sqrt(len(found))))


@dataclasses.dataclass(frozen=True)
class Row:
    """Cells that differ only in their seed.

    Attributes:
        workload, rate, policy: what they have in common.
        mean_s, p50_s, p99_s: of the latency, over seeds.
        cells: one for each seed.
    """

    workload: str
    rate: int | None
    policy: str
    mean_s: Mean
    p50_s: Mean
    p99_s: Mean
    cells: tuple[Cell, ...]

    @property
    def predicted_s(self) -> float | None:
        """Mean of the cells that were simulated; None if none was."""
        found = [cell.predicted_s for cell in self.cells if cell.predicted_s is not None]
        return float(np.mean(found)) if found else None

    @property
    def wire_bytes(self) -> list[float]:
        """Bytes sent through each host's interface, mean over cells."""
        return np.mean([cell.wire_bytes for cell in self.cells], axis=0).tolist()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of steps by part, mean over cells."""
        return {p: float(np.mean([cell.seconds[p] for cell in self.cells])) for p in PARTS}

    def average(self, name: str) -> float:
        """The mean of an attribute over the cells."""
        return float(np.mean([getattr(cell, name) for cell in self.cells]))

    def ratio(self, name: str, other: str) -> float:
        """The ratio of one attribute to another, each averaged over the cells."""
        below = self.average(other)
        return self.average(name) / below if below else float("nan")


def rows_of(cells: Iterable[Cell]) -> list[Row]:
    """Groups cells into rows, in the order of their first cells."""
    groups: dict[tuple[str, int | None, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.key, []).append(cell)
    return [
        Row(
            *key,
            mean_s=Mean.of([float(np.mean(cell.latency_s)) for cell in group]),
            p50_s=Mean.of([float(np.median(cell.latency_s)) for cell in group]),
            p99_s=Mean.of([float(np.quantile(cell.latency_s, 0.99)) for cell in group]),
            cells=tuple(group),
        )
        for key, group in groups.items()
    ]
