"""What benchmarks/paper.py asks, places and concludes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks.command import EXAMPLES
from benchmarks.evaluation import report
from benchmarks.evaluation.cells import Cell, Mean, cell_of, rows_of
from benchmarks.evaluation.predict import Measured, predicted, work_of
from benchmarks.evaluation.workloads import Placed, hosts_text, placed, read_workloads
from benchmarks.live.tasks import Plan
from benchmarks.live.watch import PARTS, Sample, Watched
from benchmarks.paper import main
from benchmarks.serving.client import Answer, Call
from benchmarks.simulation.fit import Fitted
from dance_jax.config import EngineConfig, UserError
from dance_jax.launch.hosts import parse_hosts
from dance_jax.placement import Activations, Cost, Placement
from dance_jax.placement.simulate import Model, Speed

LAYERS, EXPERTS, K = 2, 16, 4


def sample(at_s: float, share: float, sent: float) -> Sample:
    """Of two servers, after so many seconds and 100 tokens each."""
    calls = 100 * LAYERS * K if at_s else 0
    return Sample(
        at_s=at_s,
        local=[calls * (1 - share)] * 2,
        remote=[calls * share] * 2,
        sent=[sent] * 2,
        wire=[1.1 * sent] * 2,
        transfers=[sent / 64] * 2,
        busiest=[1.5 * sent / 64] * 2,
        tokens=[100.0 if at_s else 0.0] * 2,
        steps=[0.0] * 2,
        bucket_steps={},
        served=[0.0] * 2,
        longest_step_s=[0.0] * 2,
        seconds={part: [at_s / 10, at_s / 5] for part in PARTS},
        version=1,
        migrations=0,
        experts_migrated=0,
    )


def watched(latency_s: float) -> Watched:
    answers = [Answer(Call(n % 2, [1], 1), asked_s=n, end_s=n + latency_s) for n in range(4)]
    answers[-1].error = "lost"
    return Watched(answers, [sample(0, 0, 0), sample(10, 0.25, 6400)], None)


@pytest.fixture(scope="module")
def activations() -> Activations:
    """Two servers that use every other expert each."""
    rng = np.random.default_rng(0)
    own = [np.argsort(rng.random((200, LAYERS, EXPERTS // 2)), axis=2)[..., :K] for _ in range(2)]
    routes = tuple((2 * each + n).astype(np.int16) for n, each in enumerate(own))
    counts = np.array(
        [
            [np.bincount(route[:, layer].ravel(), minlength=EXPERTS) for layer in range(LAYERS)]
            for route in routes
        ]
    )
    return Activations(("alpha", "beta"), counts, "", routes)


@pytest.fixture(scope="module")
def cells(activations: Activations) -> list[Cell]:
    """Of three policies and two seeds."""
    found = []
    dance = placed("dance", activations, [1, 1], 20, Cost.reference([1, 1], K), 0)
    for policy, latency_s in (("eplb", 2.0), ("dance", 1.5), ("latency", 1.0)):
        where = dataclasses.replace(dance, policy=policy)
        for seed in range(2):
            run = watched(latency_s + 0.1 * seed)
            found.append(cell_of(run, where, "big-bench", 20_000_000, seed, LAYERS, 64))
    return found


def test_servers_hold_what_they_are_told_to() -> None:
    spec = parse_hosts(hosts_text(320, 1.32))
    assert spec.devices == (1, 1, 2)
    held = sum(server.experts * server.devices for server in spec.servers if server.experts)
    assert 1.32 * 320 <= held < 1.32 * 320 + 4
    with pytest.raises(UserError, match="at least 1"):
        hosts_text(320, 0.9)


def test_placements_are_fitted(activations: Activations) -> None:
    """Where each server has its own half, nothing leaves it."""
    dance = placed("dance", activations, [1, 1], 20, Cost.reference([1, 1], K), 0)
    assert dance.busiest == 0.0 and dance.load == pytest.approx(0.5)
    uniform = placed("uniform", activations, [1, 1], 20, Cost.reference([1, 1], K), 0)
    assert uniform.busiest > 0.5


def test_a_cell_is_what_servers_counted(cells: list[Cell]) -> None:
    cell = cells[0]
    assert (len(cell.latency_s), cell.failed) == (3, 1)
    assert cell.remote == pytest.approx(0.25) and cell.expert_calls == 2 * 100 * LAYERS * K
    assert cell.transfers == pytest.approx(0.5)
    # 0.75 of all states passed busiest links, where 0.5 do when all send at once.
    where = Placed("uniform", Placement(np.ones((2, LAYERS, EXPERTS), bool)), 1.0, 1.0, 0.5)
    assert cell_of(watched(1.0), where, "own", None, 0, LAYERS, 64).apart == pytest.approx(0.5)
    assert cell.bytes_ratio == pytest.approx(1.1)
    assert cell.seconds == pytest.approx(dict.fromkeys(PARTS, 1.5))
    assert cell.computing_s == pytest.approx(6.0) and cell.utilisation == pytest.approx(0.9)


def test_seeds_become_intervals(cells: list[Cell]) -> None:
    assert Mean.of([3.0]) == Mean(3.0, None)
    # By a table of Student's t: 12.71 x 0.1 / sqrt(2) / sqrt(2).
    assert Mean.of([1.0, 1.1]) == Mean(pytest.approx(1.05), pytest.approx(12.71 * 0.05))
    rows = rows_of(cells)
    assert [row.policy for row in rows] == ["eplb", "dance", "latency"]
    assert rows[0].mean_s.value == pytest.approx(2.05) and len(rows[0].cells) == 2
    assert report.weight(rows[0]) == pytest.approx(1.5)


def test_runs_are_simulated_with_their_own_speeds(activations: Activations) -> None:
    """And links of half the rate take longer."""
    first = dataclasses.replace(sample(0, 0, 0), bucket_steps={"4+0": [1.0, 1.0]})
    last = dataclasses.replace(
        sample(10, 0.25, 6400),
        bucket_steps={"4+0": [5.0, 6.0], "16+1": [3.0, 0.0]},
        steps=[7.0, 5.0],
        served=[300.0, 500.0],
    )
    run = Watched([], [first, last], None)
    work = work_of(run, LAYERS)
    assert work[0].buckets == {(4, 0): 4, (16, 1): 3} and work[1].buckets == {(4, 0): 5}
    assert (work[0].calls, work[0].rounds, work[0].bytes) == (300, 2 * LAYERS * 7, 6400)
    assert work[0].trunk_s == pytest.approx(1.0) and work[1].step_s == pytest.approx(4.0)
    uniform = placed("uniform", activations, [1, 1], 20, Cost.reference([1, 1], K), 0)
    plan = Plan(tuple(Call(n % 2, [1] * 30, 5, float(n)) for n in range(4)), 0.0)
    speed = Fitted(Speed(), np.inf, {})
    seconds = [
        predicted(
            Measured(rate, uniform, plan, activations, work),
            [speed, speed],
            [1, 1],
            20,
            Model(LAYERS, EXPERTS, K, 512),
            EngineConfig(max_model_len=64),
        )
        for rate in (10_000, 20_000)
    ]
    assert seconds[0] > seconds[1] > 0


def test_targets(cells: list[Cell]) -> None:
    found = {target.name: target for target in report.targets(cells)}
    (over_eplb,) = (t for name, t in found.items() if name.endswith("/ eplb"))
    (over_dance,) = (t for name, t in found.items() if name.endswith("/ dance"))
    assert over_eplb.worst == pytest.approx(1.05 / 2.05) and not over_eplb.missed
    assert over_dance.worst == pytest.approx(1.05 / 1.55) and not over_dance.missed
    assert found["answers that are not whole"].missed
    slow = [dataclasses.replace(c, latency_s=[9.0]) if c.policy == "latency" else c for c in cells]
    assert sum(target.missed for target in report.targets(slow)) == 3


def test_what_is_shown(cells: list[Cell], tmp_path: pathlib.Path, capsys: Any) -> None:
    report.show(Console(width=170), cells)
    shown = capsys.readouterr().out
    assert "big-bench, links 20Mbps" in shown and "2.05±0.64" in shown
    report.draw(cells, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(report.plain(cells)))["rows"][2]["policy"] == "latency"


def test_our_own_prompts_are_there() -> None:
    tasks = EXAMPLES / "tasks"
    workloads = read_workloads(None, tasks)
    assert [len(workload.tasks) for workload in workloads] == [3, 3]
    with pytest.raises(UserError, match="abstract_narrative"):
        read_workloads(tasks, tasks)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workloads", "own,nothing"], "no 'nothing'; there are own, others"),
        (["--tasks", "nowhere"], "nowhere"),
        (["--memory", "0.5"], "--memory 0.5"),
        (["--output", "no/such/place.json"], "--output"),
    ],
)
def test_wrong_options_start_nothing(words: list[str], said: str, capsys: Any) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err
