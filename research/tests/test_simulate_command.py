"""research/simulate.py and its parts, with few and short requests."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import pathlib

import numpy as np
import pytest

from dance_jax.bench.arrivals import Arrival
from dance_jax.bench.terminal import WRONG
from dance_jax.config import MOST_TOGETHER, UserError
from research import simulate as command
from research.policies import traces
from research.simulation import clusters, runs, tables
from research.simulation.runs import Run
from research.simulator import Model

SMALL = Model(layers=2, experts=8, top_k=2, state_bytes=64)
TOPICS = [*dict.fromkeys(topic for each in traces.GPT_OSS_WORKLOADS for topic in each)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and workloads of the sections are tiny."""
    monkeypatch.setattr(clusters, "DEEPSEEK_V2_LITE", SMALL)
    monkeypatch.setattr(clusters, "GPT_OSS_20B", SMALL)
    monkeypatch.setattr(clusters, "TOKENS", 24)
    monkeypatch.setattr(clusters, "LONGEST", 40)
    monkeypatch.setattr(runs, "REQUESTS", 8)
    monkeypatch.setattr(runs, "EACH", 1)


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    """Files as those that --traces wants, of the small model."""
    rng = np.random.default_rng(0)
    shape = (len(TOPICS), 16, SMALL.layers, SMALL.experts)
    routes = np.argsort(rng.random(shape))[..., : SMALL.top_k].astype(np.uint8)
    counts = np.stack([traces.count(route, SMALL.experts) for route in routes])
    arrays = {f"routes_{n:02d}": route for n, route in enumerate(routes)}
    found = tmp_path / "traces"
    found.mkdir()
    np.savez(found / traces.GPT_OSS, topics=np.array(TOPICS), counts=counts, **arrays)
    start = datetime.datetime(2023, 11, 16, 18)
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    lines += [f"{start + datetime.timedelta(seconds=n)},{20 + n},{3 + n % 4}" for n in range(9)]
    for name in ("code", "conv"):
        (found / f"azure_{name}.csv").write_text("\n".join(lines) + "\n")
    return found


@pytest.mark.usefixtures("small")
def test_all_sections(
    tmp_path: pathlib.Path, directory: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["--traces", str(directory), "--output", str(output), "--policies", "eplb,uniform"]
    arguments += [
        "--sweep-policies",
        "eplb,uniform",
        "--devices",
        "4,8",
        "--mbps",
        "100,1000",
        "--intervals",
        "8",
        "--lock-step",
        "--requests",
        "8",
        "--jobs",
        "1",
    ]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("How long requests would wait on servers that do not exist")
    assert "Assumptions beside those" in out and "…" not in out
    for title in (
        "parts, skewed tasks, lock step, per server: seconds of 8 requests",
        "recorded, azure code, independent, per expert: seconds of 9 requests",
        "recorded, azure conv, lock step, per expert: seconds of 9 requests",
        "Sweep, independent, per expert, eplb: mean seconds",
        "Sweep, independent, per server, uniform: mean seconds, and below eplb",
        "Sweep, lock step, per server, uniform: mean seconds, and below eplb",
    ):
        assert title in out
    assert "From 4 to 8 devices the mean changes by" in out
    assert "From 100 to 1000 Mbps it changes by" in out
    images = ("sweep", "parts_skewed_tasks", "recorded_azure_code", "recorded_azure_conv")
    for name in images:
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    plain = json.loads((output / "result.json").read_text())
    found = [Run(**each) for each in plain["runs"]]
    sections = [run.section for run in found]
    assert sections == ["parts"] * 8 + ["recorded"] * 16 + ["sweep"] * (3 * 2 * 2 * 2)
    for run in found:
        check_figures(run)
    assert {(run.devices, run.servers) for run in found} == {(4, 3), (8, 6)}
    assert "assumptions" in plain


def check_figures(run: Run) -> None:
    assert 0 < run.ttft_mean <= run.mean <= run.p99
    assert run.p50 <= run.p99 and run.ttft_p50 <= run.ttft_p99 <= run.p99
    assert len(run.sent_bytes) == len(run.out_use) == len(run.device_use) == run.servers
    assert sum(map(len, run.device_use)) == run.devices
    assert sum(run.sent_bytes) == sum(run.received_bytes) > 0
    assert 0 < run.busiest_device <= 1 and 0 < run.busiest_link <= 1
    assert run.network == pytest.approx(run.communicate_s / (run.compute_s + run.communicate_s))
    assert (run.compute_s + run.communicate_s <= run.simulated_s) or not run.lock_step


@pytest.mark.usefixtures("small")
def test_equal_seeds_give_equal_runs() -> None:
    def figures(seed: int) -> list[Run]:
        found = runs.parts(["dance"], seed, lambda line: None)
        return [dataclasses.replace(run, wall_s=0.0) for run in found]

    assert figures(0) == figures(0) != figures(1)


def test_devices_of_clusters() -> None:
    assert clusters.devices_of(8) == (1, 1, 2, 1, 1, 2)
    for count in (0, 2, 6, 33):
        with pytest.raises(UserError, match=f"{count} devices: servers have"):
            clusters.devices_of(count)
    # There are no more servers than can step together.
    assert len(clusters.devices_of(clusters.MOST_DEVICES)) <= MOST_TOGETHER


@pytest.mark.usefixtures("small")
def test_clusters_in_lock_step_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "MOST_DEVICES", 4)
    what = runs.Sweep((4, 8), (1e9,), (9.0,), ("uniform",), 8, lock_step=True)
    found = list(runs.sweep(what, 0, lambda _: None))
    sizes = [(run.lock_step, run.devices) for run in found]
    assert sizes == [(False, 4), (False, 8)] * 2 + [(True, 4)]
    assert not any(lock_step for lock_step, *_ in runs.Sweep().cells())


def test_processes_find_what_one_finds() -> None:
    what = runs.Sweep((4,), (1e9,), (8.0,), ("uniform",), requests=2)
    one, other = (
        [dataclasses.replace(run, wall_s=0.0) for run in runs.sweep(what, 0, lambda _: None, jobs)]
        for jobs in (1, 2)
    )
    assert one == other and len(one) == 2


def test_devices_hold_what_is_said() -> None:
    for model in (clusters.DEEPSEEK_V2_LITE, SMALL):
        servers = clusters.servers_with(clusters.PATTERN, model, 1e9)
        slots = sum(server.devices * server.slots for server in servers)
        experts = model.layers * model.experts
        assert 4 * clusters.MEMORY * experts <= slots <= 4 * clusters.MEMORY * experts + 4


def test_tasks_are_skewed_and_differ() -> None:
    tasks = clusters.skewed_tasks(3, clusters.DEEPSEEK_V2_LITE, seed=0)
    share_nle = np.sort(tasks.counts, axis=2)[..., ::-1] / tasks.counts.sum(2, keepdims=True)
    # An even choice would give the first sixteen of 64 a quarter.
    assert (share_nle[..., :16].sum(2).mean((1, 2) if share_nle.ndim > 3 else 1) > 0.5).all()
    fit, served = tasks.fit, tasks.served
    assert not np.array_equal(fit[0], served[0])
    # What policies see says what is served there, and little of what is elsewhere.
    seen_le = tasks.counts[0].astype(float)
    here, there = (traces.count(route, 64).astype(float) for route in served[:2])
    assert np.corrcoef(seen_le.ravel(), here.ravel())[0, 1] > 0.9
    assert abs(np.corrcoef(seen_le.ravel(), there.ravel())[0, 1]) < 0.2
    # Whoever else is there changes nothing.
    assert np.array_equal(clusters.skewed_tasks(1, clusters.DEEPSEEK_V2_LITE, 0).fit[0], fit[0])
    assert all((np.diff(np.sort(route), axis=2) > 0).all() for route in served)


def test_long_requests_lose_the_begin_of_their_prompt() -> None:
    longest = clusters.CONFIG.max_model_len
    requests = clusters.requests_of(
        [Arrival(1.0, 0, longest, 10), Arrival(2.0, 1, 5, longest + 9), Arrival(3.0, 1)]
    )
    assert (requests.prompt + requests.output).tolist()[:2] == [longest, longest]
    assert requests.output.tolist() == [10, longest - 1, 1]
    assert requests.prompt.tolist()[1:] == [1, 1]


def test_requests_come_at_the_rate_that_is_said() -> None:
    requests = clusters.poisson_requests(4, 10.0, 2000, seed=1)
    assert len(requests) == 2000 and set(requests.server) == {0, 1, 2, 3}
    assert requests.at.max() / 2000 * 4 == pytest.approx(10.0, rel=0.1)
    assert np.median(requests.prompt) == pytest.approx(clusters.PROMPT_MEDIAN, rel=0.1)


def test_gains_are_over_the_baseline_of_the_same_scenario() -> None:
    made = {field.name: 0 for field in dataclasses.fields(Run)}
    base = Run(**made | {"policy": "eplb", "mean": 4.0})  # type: ignore[arg-type]
    other = dataclasses.replace(base, policy="dance", mean=3.0)
    elsewhere = dataclasses.replace(other, bandwidth=1.0)
    assert tables.less(other, [base, other]) == 0.25
    assert tables.less(base, [base, other]) is None
    assert tables.less(elsewhere, [base, other]) is None


def test_trends() -> None:
    made = {field.name: 0 for field in dataclasses.fields(Run)}
    base = Run(**made)  # type: ignore[arg-type]
    means = {(4, 1e8): 8.0, (4, 1e9): 4.0, (256, 1e8): 6.0, (256, 1e9): 5.0}
    found = [
        dataclasses.replace(base, devices=count, bandwidth=rate, mean=mean + extra)
        for (count, rate), mean in means.items()
        for extra in (-1.0, 1.0)
    ]
    more_devices, faster = tables.trends(found)
    assert "From 4 to 256 devices the mean changes by -25% to +25%" in more_devices
    assert "From 100 to 1000 Mbps it changes by -50% at 4, -17% at 256 devices" in faster
    assert tables.trends(found[:2]) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--sections", "all"], "all"),
        (["--policies", "best"], "best"),
        (["--devices", "4.5"], "4.5 devices: whole numbers"),
        (["--devices", "12"], None),
        (["--devices", "6"], "6 devices: servers have"),
        (["--devices", "344"], "344 devices are 258 servers"),
        (["--mbps", "fast"], "numbers with commas"),
        (["--intervals", "0"], "numbers above 0"),
        (["--seed", "-1"], "not a whole number"),
    ],
)
def test_options(
    arguments: list[str], reason: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason is None:
        assert isinstance(command.parser().parse_args(arguments), argparse.Namespace)
        return
    with pytest.raises(SystemExit):
        command.parser().parse_args(arguments)
    assert reason in capsys.readouterr().err


def test_what_cannot_be_done_is_said(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--sections", "recorded"]) == WRONG
    assert "--traces DIR is needed" in capsys.readouterr().err
    file = tmp_path / "file"
    file.touch()
    assert command.main(["--sections", "parts", "--output", str(file)]) == WRONG
    assert f"--output: {file} cannot be written to" in capsys.readouterr().err
    assert command.main(["--sections", "recorded", "--traces", str(tmp_path)]) == WRONG
    assert "gpt_oss" in capsys.readouterr().err
