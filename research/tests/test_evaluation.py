"""What research/paper.py asks, places and concludes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks.command import EXAMPLES
from benchmarks.live.tasks import Plan, Task
from benchmarks.live.watch import COMPUTING, PARTS, Sample, Watched
from dance_jax.bench.client import Answer, Call
from dance_jax.bench.terminal import INTERRUPTED
from dance_jax.config import EngineConfig, UserError
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.models.directory import demo_dir, read_config
from dance_jax.models.hf import HFDirectory
from dance_jax.models.tokenizer import Tokenizer
from dance_jax.placement.activations import Activations
from dance_jax.placement.core import Placement
from dance_jax.placement.cost import CallCost
from dance_jax.placement.spare import reserve
from research import paper
from research.evaluation import report
from research.evaluation.cells import Cell, Mean, cell_of, rows_of
from research.evaluation.predict import Machine, Measured, predictions, work_of
from research.evaluation.quota import TYPICAL_S, with_quotas
from research.evaluation.runs import Runs
from research.evaluation.shapes import SHAPES
from research.evaluation.weight import nearest, weights_of
from research.evaluation.workloads import Placed, Workload, hosts_text, placed, read_workloads
from research.paper import MATRIX, check, main, parser
from research.simulator import Model, Server, Speed, Work, simulate

LAYERS, EXPERTS, K = 2, 16, 4
CONFIG = EngineConfig(max_model_len=64)


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
        away=[sent / 80] * 2,
        busiest=[1.5 * sent / 64] * 2,
        tokens=[100.0 if at_s else 0.0] * 2,
        steps=[at_s * 5] * 2,
        bucket_steps={},
        positions=[0.0] * 2,
        served=[0.0] * 2,
        messages=[0.0] * 2,
        rows=[0.0] * 2,
        repeats=[0.0] * 2,
        longest_step_s=[0.0] * 2,
        seconds={part: [at_s / 10, at_s / 5] for part in PARTS},
        cpu_s=[at_s / 4, at_s / 2],
        version=1,
        migrations=0,
        experts_migrated=0,
    )


def watched(latency_s: float) -> Watched:
    answers = [Answer(Call(n % 2, [1], 1), due_s=n, end_s=n + latency_s) for n in range(4)]
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
    dance = placed("dance", activations, [1, 1], 20, CallCost.reference([1, 1], K), 0)
    for policy, latency_s in (("eplb", 2.0), ("dance", 1.5), ("latency", 1.0)):
        where = dataclasses.replace(dance, policy=policy)
        for seed in range(2):
            run = watched(latency_s + 0.1 * seed)
            found.append(cell_of(run, where, "big-bench", 20_000_000, seed, LAYERS, 64))
    return found


def test_servers_hold_what_they_are_told_to() -> None:
    for hosts, devices in ((None, (1, 1, 2)), (5, (1,) * 5)):
        spec = parse_hosts(hosts_text(320, 1.32, hosts))
        assert spec.devices == devices
        slots = [server.experts or 0 for server in spec.servers]
        held = np.dot(spec.devices, [each - reserve(each) for each in slots])
        assert 1.32 * 320 <= held < 1.32 * 320 + sum(devices)
    tasks = (Task("a", ("1",), ("2",)), Task("b", ("3",), ("4",)))
    assert [task.name for task in Workload("w", tasks).on(5).tasks] == list("ababa")
    with pytest.raises(UserError, match="at least 1"):
        hosts_text(320, 0.9)


def test_placements_are_fitted(activations: Activations) -> None:
    """Where each server has its own half, nothing leaves it."""
    dance = placed("dance", activations, [1, 1], 20, CallCost.reference([1, 1], K), 0)
    assert dance.busiest == 0.0 and dance.load == pytest.approx(0.5)
    uniform = placed("uniform", activations, [1, 1], 20, CallCost.reference([1, 1], K), 0)
    assert uniform.busiest > 0.5


def test_a_cell_is_what_servers_counted(cells: list[Cell]) -> None:
    cell = cells[0]
    assert (len(cell.latency_s), cell.failed) == (3, 1)
    assert cell.remote == pytest.approx(0.25) and cell.expert_calls == 2 * 100 * LAYERS * K
    assert cell.transfers == pytest.approx(0.5) and cell.any_miss == pytest.approx(0.4)
    # 0.75 of all states passed busiest links, where 0.5 do when all send at once.
    where = Placed("uniform", Placement(np.ones((2, LAYERS, EXPERTS), bool)), 1.0, 1.0, 0.5)
    assert cell_of(watched(1.0), where, "own", None, 0, LAYERS, 64).apart == pytest.approx(0.5)
    assert cell.bytes_ratio == pytest.approx(1.1)
    assert cell.seconds == pytest.approx(dict.fromkeys(PARTS, 1.5))
    assert cell.computing_s == pytest.approx(6.0) and cell.utilisation == pytest.approx(0.9)
    assert (cell.steps, cell.tokens) == (50, 200)


def test_seeds_become_intervals(cells: list[Cell]) -> None:
    assert Mean.of([3.0]) == Mean(3.0, None)
    # By a table of Student's t: 12.71 x 0.1 / sqrt(2) / sqrt(2).
    assert Mean.of([1.0, 1.1]) == Mean(pytest.approx(1.05), pytest.approx(12.71 * 0.05))
    rows = rows_of(cells)
    assert [row.policy for row in rows] == ["eplb", "dance", "latency"]
    assert rows[0].mean_s.value == pytest.approx(2.05) and len(rows[0].cells) == 2
    assert rows[0].ratio("step_s", "computing_s") == pytest.approx(9 / 6)
    assert rows[0].wire_bytes == pytest.approx([1.1 * 6400] * 2)
    assert rows[0].seconds == pytest.approx(dict.fromkeys(PARTS, 1.5))


def test_weight_of_communication(cells: list[Cell]) -> None:
    """Steps of the policy with the most remote calls; twice and nine times its computing."""
    found = []
    for rate, alone in ((500_000_000, 4.5), (20_000_000, 1.0)):
        for cell in cells:
            remote = 0.8 if cell.policy == "dance" else 0.25
            step = {"wait": 0.0, "exchange": 0.0} if cell.policy == "latency" else {}
            seconds = dict.fromkeys(COMPUTING, alone / 4) | {"wait": 9 - alone, "exchange": 0.0}
            changes = {"rate": rate, "remote": remote, "seconds": seconds | step}
            found.append(dataclasses.replace(cell, **changes))
    weights = weights_of(rows_of(found))
    assert [weight.most.policy for weight in weights] == ["dance"] * 2
    assert [weight.over_alone for weight in weights] == pytest.approx([2, 9])
    assert [weight.all_remote for weight in weights] == pytest.approx([1 + 1 / 0.8, 1 + 8 / 0.8])
    assert [weight.best.policy for weight in weights] == ["latency"] * 2
    assert [weight.over_best for weight in weights] == pytest.approx([2, 9])
    (most_like,) = nearest(weights)
    assert most_like.most.rate == 20_000_000
    assert "20Mbps: dance, with 80% of calls remote, takes 9.0 times" in most_like.line()
    judged = [target.name for target in report.targets(found) if " / " in target.name]
    assert len(judged) == 2 and all("20Mbps" in name for name in judged)


MODEL = Model(LAYERS, EXPERTS, K, 512)


def machine_of(*speeds: Speed) -> Machine:
    """Of servers with a device each."""
    servers = tuple(Server(1, 20, speed, beside=True) for speed in speeds)
    return Machine(servers, MODEL, CONFIG)


def test_runs_are_simulated_with_their_own_speeds(activations: Activations) -> None:
    """And links of half the rate take longer."""
    first = dataclasses.replace(sample(0, 0, 0), bucket_steps={"4+0": [1.0, 1.0]})
    last = dataclasses.replace(
        sample(10, 0.25, 6400),
        bucket_steps={"4+0": [5.0, 6.0], "16+1": [3.0, 0.0]},
        steps=[7.0, 5.0],
        served=[300.0, 500.0],
        messages=[20.0, 30.0],
        rows=[40.0, 70.0],
        positions=[900.0, 0.0],
    )
    work = work_of(Watched([], [first, last], None))
    (alpha,), (beta,) = work
    assert alpha.buckets == {(4, 0): 4, (16, 1): 3} and beta.buckets == {(4, 0): 5}
    assert (alpha.steps, alpha.calls, alpha.messages, alpha.rows) == (7, 300, 20, 40)
    assert alpha.positions == 900
    # Four of the parts, in which nothing is waited for.
    assert alpha.computing_s == pytest.approx(4.0) and beta.computing_s == pytest.approx(8.0)
    assert (alpha.processor_s, beta.processor_s) == (2.5, 5.0)
    uniform = placed("uniform", activations, [1, 1], 20, CallCost.reference([1, 1], K), 0)
    plan = Plan(tuple(Call(n % 2, [1] * 30, 5, float(n)) for n in range(4)), 0.0)
    machine = machine_of(Speed(token=1e-4), Speed(token=1e-4))
    runs = [
        Measured(rate, uniform, plan, (5, 1, 2, 0), activations, work, 0.1, 1.0)
        for rate in (10_000, 20_000)
    ]
    seconds = [machine.predict(run, 0.0).latency_s for run in runs]
    assert seconds[0] > seconds[1] > 0
    longer = dataclasses.replace(runs[0], outputs=(5, 5, 5, 5))
    assert machine.predict(longer, 0.0).latency_s > seconds[0]


def test_what_no_clock_tells_is_told_by_other_policies(activations: Activations) -> None:
    """Runs that were themselves simulated, one with a message and a request of its own."""
    plan = Plan(tuple(Call(n % 2, [1] * 30, 5, n / 10) for n in range(8)), 0.0)
    machine = machine_of(Speed(token=1e-4), Speed(token=1e-4))
    runs, expected = [], []
    for policy in ("uniform", "redundance", "eplb"):
        found = placed(policy, activations, [1, 1], 20, CallCost.reference([1, 1], K), 0)
        run = Measured(1_000_000, found, plan, (5,) * 8, activations, (), 1.0, 1.0)
        own = policy == "eplb"
        told = machine.predict(run, 8e-4 if own else 2e-4)
        latency_s = told.latency_s + (0.5 if own else 0.125)
        runs.append(dataclasses.replace(run, step_s=told.step_s, latency_s=latency_s))
        expected.append(machine.predict(run, 2e-4).latency_s + 0.125)
    assert predictions(machine, runs)[2] == pytest.approx(expected[2])
    nothing = dataclasses.replace(runs[1], step_s=0.0)
    assert predictions(machine, [runs[0], nothing, runs[2]])[2] == pytest.approx(expected[2])
    assert predictions(machine, runs[:1]) == pytest.approx([expected[0] - 0.125])
    assert predictions(machine, [nothing])[0] > 0
    failed = dataclasses.replace(runs[1], latency_s=float("nan"))
    assert predictions(machine, [runs[0], failed, runs[2]])[2] == pytest.approx(expected[2])
    # Links of another rate have messages of their own, but no requests.
    faster = [dataclasses.replace(run, rate=10**9, latency_s=9.0) for run in runs]
    of_both = predictions(machine, [*runs, *faster])
    assert of_both[2] > expected[2] + 1


def test_what_quotas_keep_is_found(activations: Activations) -> None:
    """Of runs that were themselves simulated: computing in short steps and in long ones."""
    buckets = {(8, 0): 5e-3, (8, 1): 3e-2}
    first = Speed(buckets=buckets, call=2e-5, message=1e-5, row=3e-5, quota=0.5, burst=2e-3)
    second = dataclasses.replace(first, quota=1.0, burst=1e-3)
    true = machine_of(first, second)
    runs = []
    for policy, count, output in (
        ("uniform", 8, 30), ("eplb", 8, 30), ("eplb", 8, 2), ("uniform", 5, 2), ("dance", 20, 9),
        ("redundance", 12, 5), ("smartmoe", 9, 16),
    ):  # fmt: skip
        plan = Plan(tuple(Call(n % 2, [1] * 20, output, n / 10) for n in range(count)), 0.0)
        found = placed(policy, activations, [1, 1], 20, CallCost.reference([1, 1], K), 0)
        run = Measured(1_000_000, found, plan, (output,) * count, activations, (), 1.0, 1.0)
        result = simulate(true.scenario(run, TYPICAL_S))
        assert result.work[0].computing_s > 1.1 * result.work[0].processor_s
        runs.append(dataclasses.replace(run, work=tuple((each,) for each in result.work)))
    together = dataclasses.replace(runs[0], work=((Work(processor_s=1.0),),) * 2)
    with pytest.raises(UserError, match="no expert calls were counted"):
        Machine.fitted([together], [1, 1], 20, MODEL, CONFIG)
    machine, fitted = Machine.fitted(runs, [1, 1], 20, MODEL, CONFIG)
    assert max(one.error for one in fitted) < 1e-9
    for server, speed in zip(machine.servers, (first, second), strict=True):
        assert server.speed.buckets == pytest.approx(speed.buckets)
        assert server.speed.call == pytest.approx(speed.call)
    machine, off = with_quotas(machine, runs, [0.5, 1.0])
    assert off == pytest.approx([0, 0], abs=0.02)
    for server, speed in zip(machine.servers, (first, second), strict=True):
        assert server.speed.quota == speed.quota
    assert machine.servers[0].speed.burst == pytest.approx(first.burst, rel=0.2)


def test_runs_are_kept(
    cells: list[Cell], activations: Activations, tmp_path: pathlib.Path, capsys: Any
) -> None:
    """And simulated again, without a testbed."""
    uniform = placed("uniform", activations, [1, 1], 20, CallCost.reference([1, 1], K), 0)
    plan = Plan(tuple(Call(n % 2, [1] * 30, 5, float(n)) for n in range(4)), 0.0)
    work = tuple(
        Work(10, collections.Counter({b: 10}), 0, calls, messages, computing_s=0.9, processor_s=s)
        for b, calls, messages, s in (
            ((4, 0), 100, 10, 0.5), ((16, 1), 300, 30, 0.9), ((16, 1), 500, 10, 0.8),
            ((16, 1), 700, 90, 1.4),
        )
    )  # fmt: skip
    slow, fast = (
        Measured(rate, uniform, plan, (5,) * 4, activations, (work,) * 2, 0.1, 1.0)
        for rate in (1_000_000, 20_000_000)
    )
    runs = Runs(
        names=("alpha", "beta"),
        devices=(1, 1),
        cores=(0.5, 0.5),
        slots=20,
        model=MODEL,
        config=CONFIG,
        setup={"memory": 1.25},
        cells=(dataclasses.replace(cells[0], rate=slow.rate), cells[1]),
        measured=(slow, fast),
    )
    kept, result = tmp_path / "runs", tmp_path / "result.json"
    runs.save(kept)
    assert main(["--runs", str(kept), "--output", str(result)]) == 0
    found = json.loads(result.read_text())
    shown = capsys.readouterr().out
    assert "alpha: Speed(" in shown and "beta: a quota of 0.5 cores, of which" in shown
    assert found["setup"] == {"memory": 1.25}
    predicted = [cell.predicted_s for cell in runs.simulated(Console(quiet=True))]
    assert [row["predicted_s"] for row in found["rows"]] == pytest.approx(predicted)
    assert predicted[0] != predicted[1]
    kept.write_text("nothing")
    other = tmp_path / "other"
    other.write_bytes(pickle.dumps({"runs": 1}))
    for path in (kept, other, tmp_path / "nowhere"):
        assert main(["--runs", str(path)]) == 2
        assert f"--runs: {path}" in capsys.readouterr().err


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
    assert "big-bench: of these 1.5, at 20Mbps, is nearest to the paper's 8.3" in shown
    plain = json.loads(json.dumps(report.plain(cells)))
    row = plain["rows"][2]
    assert row["policy"] == "latency" and row["mean_s"] == pytest.approx(
        {"value": 1.05, "half": 12.71 * 0.05}
    )
    assert row["p99_s"]["value"] == pytest.approx(1.05)
    assert row["wire_bytes"] == pytest.approx([1.1 * 6400] * 2)
    known = {
        "remote": 0.25,
        "any_miss": 0.4,
        "transfers": 0.5,
        "busiest": 0.0,
        "load": 0.5,
        "utilisation": 0.9,
    }
    known |= {"bytes_ratio": 1.1, "computing_s": 6.0, "step_s": 9.0}
    assert {name: row[name] for name in known} == pytest.approx(known)
    assert plain["nearest_to_paper"][0]["rate"] == 20_000_000


def test_our_own_prompts_are_there() -> None:
    tasks = EXAMPLES / "tasks"
    workloads = read_workloads(None, tasks)
    assert [len(workload.tasks) for workload in workloads] == [3, 3]
    with pytest.raises(UserError, match="abstract_narrative"):
        read_workloads(tasks, tasks)


def test_a_mixtral_is_made(tmp_path: pathlib.Path) -> None:
    """Policies have a place for its experts; the demo model's tokens are its own."""
    shape = SHAPES["mixtral"]
    directory = shape.write(tmp_path / "mixtral")
    model = HFDirectory(directory).config
    demo = read_config(demo_dir())
    assert (model.family, model.num_experts, model.top_k) == ("mixtral", 8, 2)
    assert (model.vocab_size, model.max_position) == (demo.vocab_size, demo.max_position)
    assert model.eos_token_ids == demo.eos_token_ids
    text = "Was ist 3 + 4?"
    ours, theirs = Tokenizer.load(directory), Tokenizer.load(demo_dir())
    assert ours.encode(text) == theirs.encode(text)
    spec = parse_hosts(hosts_text(len(model.moe_layers) * model.num_experts, shape.memory))
    assert [server.experts for server in spec.servers] == [18 + 1] * 3
    rng = np.random.default_rng(0)
    choices = rng.random((3, 24, len(model.moe_layers), model.num_experts)).argsort(axis=3)
    routes = choices[..., : model.top_k].astype(np.int16)
    counts = np.stack([(routes == expert).sum(axis=(1, 3)) for expert in range(8)], axis=2)
    even = Activations(spec.names, counts, "", tuple(routes))
    cost = CallCost.reference(spec.devices, model.top_k)
    for policy in MATRIX[:-1]:  # ours takes seconds
        found = placed(policy, even, spec.devices, 18, cost, 0)
        assert found.placement.resident.any(axis=0).all(), policy


def test_the_model_that_is_made_goes_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends it."""
    seen: list[pathlib.Path] = []

    def ends(bed: str, script: str, words: list[str]) -> int:
        directory = pathlib.Path(words[words.index("--model") + 1])
        assert words.index("--model") < words.index("--") and "--shape" in words
        assert (directory / "model.safetensors").exists()
        seen.append(directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(paper, "testbed", lambda *_: contextlib.nullcontext("bed"))
    monkeypatch.setattr(paper, "again_on", ends)
    assert main(["--shape", "mixtral", "--", "--max-num-seqs", "8"]) == INTERRUPTED
    assert len(seen) == 1 and not seen[0].parent.exists()


@pytest.mark.parametrize(("words", "memory"), [([], 1.32), (["--shape", "mixtral"], 1.11)])
def test_memory_is_the_papers(words: list[str], memory: float) -> None:
    assert check(parser().parse_args(words), demo_dir()).memory == memory
    asked = parser().parse_args([*words, "--memory", "1.5"])
    assert check(asked, demo_dir()).memory == 1.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workloads", "own,nothing"], "no 'nothing'; there are own, others"),
        (["--tasks", "nowhere"], "nowhere"),
        (["--memory", "0.5"], "--memory 0.5"),
        (["--shape", "mixtral", "--model", "there"], "give one of them"),
        (["--output", "no/such/place.json"], "--output"),
        (["--save-runs", "no/such/place"], "--save-runs"),
    ],
)
def test_wrong_options_start_nothing(words: list[str], said: str, capsys: Any) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err
