"""Real launches: three processes with 1, 1 and 2 devices, what they print, and how they end."""

from __future__ import annotations

import collections
import json
import pathlib
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest

from dance_jax.placement.activations import Activations
from tests.launch.cold_run import PROMPTS, Tiny
from tests.launch.tiny import EXPERT_BYTES, EXPERTS, LAYERS
from tests.traces import Event, read_trace, slices, tracks


def many_prompts(folder: pathlib.Path) -> pathlib.Path:
    """Prompts that take much longer than a test."""
    path = folder / "many.jsonl"
    path.write_text('{"prompt": "on and on", "max_tokens": 240}\n' * 400)
    return path


def test_results_come_in_input_order(tiny: Tiny) -> None:
    names = ["alpha", "beta", "alpha", "gamma", "beta", "gamma"]
    assert [line["index"] for line in tiny.lines] == list(range(len(PROMPTS)))
    assert [line["server"] for line in tiny.lines] == names
    assert [line["prompt"] for line in tiny.lines] == [line["prompt"] for line in PROMPTS]
    for number in (0, 2, 3, 5):
        line, asked = tiny.lines[number], PROMPTS[number]
        assert set(line) == {
            "index", "server", "prompt", "text", "token_ids", "finish_reason", "metrics",
        }  # fmt: skip
        assert line["finish_reason"] in ("length", "stop")
        assert 1 <= len(line["token_ids"]) <= asked["max_tokens"]
        assert 0 < line["metrics"]["ttft_s"] <= line["metrics"]["e2e_s"]


def test_prompts_that_cannot_run_do_not_stop_the_others(tiny: Tiny) -> None:
    long, empty = tiny.lines[1], tiny.lines[4]
    for line in (long, empty):
        assert line["finish_reason"] == "error"
        assert line["text"] == "" and line["token_ids"] == []
        assert line["error"] in tiny.terminal
    assert "400 tokens" in long["error"] and "256" in long["error"]
    assert "empty" in empty["error"]


def test_a_batch_that_is_given_up_leaves_no_trace(tiny: Tiny) -> None:
    """Its requests have ended, and the next batch runs as if the first had never existed."""
    for asked, line, before in zip(PROMPTS, tiny.again, tiny.lines, strict=True):
        if "temperature" not in asked:  # sampled requests draw new seeds
            assert {**line, "metrics": None} == {**before, "metrics": None}


def test_pools_hold_what_is_placed_and_no_more_than_memory_allows(
    tiny: Tiny, expert_library: pathlib.Path | None
) -> None:
    """Bytes of loaded experts with the C++ library; bytes of all slots if the pool is in JAX."""
    pools = tiny.result.traffic.pool_bytes
    layout = tiny.result.plan.layout
    assert layout.slots_per_device == (14, 11, 10)
    held = [
        [(layout.experts_of(rank, device)[:, 0] >= 0).sum() for device in range(devices)]
        for rank, devices in enumerate(layout.devices)
    ]
    assert sum(map(sum, held)) == LAYERS * EXPERTS, "each expert once"
    if expert_library is None:
        held = [[14], [11], [10, 10]]
    assert pools == tuple(tuple(EXPERT_BYTES * experts for experts in own) for own in held)
    assert f"{pools[0][0]:,}" in tiny.terminal


def test_transfers_agree_with_the_recorded_routes(tiny: Tiny) -> None:
    traffic, placement = tiny.result.traffic, tiny.result.plan.placement
    assert [len(routes) for routes in traffic.routes] == traffic.tokens.tolist()
    assert traffic.tokens[1] == 0  # beta's prompts were refused
    for server, routes in enumerate(traffic.routes):
        if not len(routes):
            assert not traffic.transfers[:, server].any()
            continue
        alone = [routes if n == server else routes[:0] for n in range(3)]
        expected = placement.traffic(alone).transfers_lnn[:, server] * len(routes)
        assert np.array_equal(traffic.transfers[:, server], np.round(expected))
        counts = np.stack(
            [np.bincount(routes[:, layer].ravel(), minlength=EXPERTS) for layer in range(LAYERS)]
        )
        assert np.array_equal(traffic.counts[server], counts)
    assert f"{traffic.transfers_per_token:.3f} remote servers" in tiny.terminal


def test_tokens_wait_for_layers_with_a_miss(tiny: Tiny) -> None:
    traffic, resident = tiny.result.traffic, tiny.result.plan.placement.resident
    missed = [
        ~resident[server][np.arange(LAYERS)[:, None], routes].all(-1)
        for server, routes in enumerate(traffic.routes)
    ]
    assert traffic.away.tolist() == [each.sum() for each in missed]
    assert traffic.any_miss == pytest.approx(np.concatenate(missed).mean())
    waited = f"{traffic.layers_waited:.2f} of {LAYERS} per token (any-miss {traffic.any_miss:.3f})"
    assert waited in tiny.terminal


def test_the_summary_has_everything(tiny: Tiny) -> None:
    for words in (
        "requests",
        "2 of them with an error",
        "prompt tokens",
        "output tokens",
        "per second",
        "time to first token",
        "end-to-end latency",
        "p50",
        "p99",
        f"{tiny.result.local_share:.3f}",
        *(f"{count:,}" for count in tiny.result.traffic.bytes_sent[0, 1:]),
    ):
        assert words in tiny.terminal
    assert (np.diag(tiny.result.traffic.bytes_sent) == 0).all()


def test_a_warm_start_gives_the_same(
    tiny: Tiny, launch, tmp_path: pathlib.Path, expert_library: pathlib.Path | None
) -> None:
    """Every process reads its steps from the cache, and they compute the same.

    A trace does not change the results either.
    """
    # Servers with equal devices compile the same and may find what another server has compiled.
    assert [sum(each) for each in tiny.cold] == [tiny.functions] * 3 and tiny.cold[2][0] == 0
    output, saved = tmp_path / "out.jsonl", tmp_path / "saved.npz"
    run = launch(
        "--policy", "uniform", "--prompts", tiny.folder / "prompts.jsonl", "--max-tokens", "8",
        "--output", output, "--save-activations", saved, "--log-dir", tmp_path / "logs",
        "--trace", tmp_path / "trace.json",
    )  # fmt: skip
    run.wait_for("alpha: ready")
    assert run.process.wait(120) == 0, run.text
    run.assert_nothing_left()
    for name in ("alpha", "beta", "gamma"):
        log = (tmp_path / "logs" / f"{name}.log").read_text()
        assert log.count("read from the cache") == tiny.functions
        assert "compiled in" not in log
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    for line, before in zip(lines, tiny.lines, strict=True):
        assert {**line, "metrics": None} == {**before, "metrics": None}
    activations = Activations.load(saved)
    assert activations.servers == ("alpha", "beta", "gamma")
    assert activations.model == tiny.source
    assert np.array_equal(activations.counts, tiny.result.traffic.counts)
    assert "No activations were given" in run.text
    assert "gamma 5 | " in run.text
    check_trace(read_trace(tmp_path / "trace.json"), tiny, calls=expert_library is not None)


def check_trace(events: list[Event], tiny: Tiny, calls: bool) -> None:
    """Every token of every request is in a step; with calls, every layer and both call ends are."""
    steps = [event for event in events if event["name"].startswith("step ")]
    computed = collections.Counter()
    for step in steps:
        computed.update(step["args"]["requests"])
    for line in tiny.lines:
        if line["finish_reason"] != "error":
            # The last token is never an input.
            count = len(line["prompt"].encode()) + len(line["token_ids"]) - 1
            assert computed[f"{line['index']}.0"] == count
    if not calls:
        return
    names = tracks(events)
    # The rows of a long slice go through a layer in two groups.
    found = {
        (event["pid"], event["args"]["step"], event["tid"], event["name"])
        for event in events
        if event["name"].startswith("layer ") and ":" not in names[event["pid"], event["tid"]]
        if event["cat"] == "part"
    }
    layers = collections.Counter((pid, step) for pid, step, _, _ in found)
    devices = tiny.result.plan.spec.devices
    assert layers == {
        (step["pid"], step["args"]["step"]): LAYERS * devices[step["pid"]] for step in steps
    }
    sent, served = slices(events, "call"), slices(events, "served")
    assert sent and sent.keys() == served.keys()
    # All events are on one clock, in microseconds; another core may note the answer's begin first.
    assert all(sent[key]["ts"] <= event["ts"] + 1000 for key, event in served.items())
    by_step = {(step["pid"], step["args"]["step"]): step["args"]["requests"] for step in steps}
    for (caller, _), event in served.items():
        rank = tiny.result.plan.spec.names.index(caller)
        assert by_step[rank, event["args"]["step"]], "calls are of requests"


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_dead_server_is_named(rank: int, tiny: Tiny, launch, tmp_path: pathlib.Path) -> None:
    """All processes end within 10 s, with the server's name and the end of its log."""
    trace = tmp_path / "trace.json"
    run = launch("--prompts", many_prompts(tmp_path), "--trace", trace)
    # The coordinator is killed while servers start, another server while the batch runs.
    run.wait_for("alpha: loading" if rank == 0 else " | ")
    run.worker(rank).send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert run.process.wait(10) == 1
    run.assert_nothing_left(10 - (time.monotonic() - began))
    name = ("alpha", "beta", "gamma")[rank]
    assert f"server {name} (process {run.worker(rank).pid}) was killed by signal 9" in run.text
    assert len(read_trace(trace)) >= len(run.workers)
    assert "last lines of its log" in run.text and "INFO: devices: cpu:0" in run.text
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 128 + signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_nothing(number: int, code: int, tiny: Tiny, launch, tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    run = launch("--prompts", many_prompts(tmp_path), "--output", output)
    # One signal comes while the batch runs, the other while servers start.
    run.wait_for(" [length]" if number == signal.SIGINT else "joining")
    ports = {c.laddr.port for p in run.workers for c in p.net_connections() if c.status == "LISTEN"}
    run.process.send_signal(number)
    assert run.process.wait(10) == code
    run.assert_nothing_left()
    listening = {c.laddr.port for c in psutil.net_connections() if c.status == "LISTEN"}
    assert not ports & listening
    assert not output.exists()
    if number == signal.SIGINT:
        complete = [json.loads(line) for line in partial.read_text().splitlines()]
        assert f"complete answers: {len(complete)}, in {partial}" in run.text
        assert {len(answer["token_ids"]) for answer in complete} == {240}
    else:
        assert not partial.exists()


@pytest.mark.slow
def test_a_full_disk_behind_the_terminal_ends_no_batch(tiny: Tiny, tmp_path: pathlib.Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "on and on", "max_tokens": 4}\n')
    command = tiny.command("--prompts", prompts, "--output", output)
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert "error: some of the output could not be written" in ended.stderr
    (answer,) = map(json.loads, output.read_text().splitlines())
    assert answer["finish_reason"] == "length"


@pytest.mark.slow
def test_an_ignored_signal_ends_nothing(tiny: Tiny, launch, tmp_path: pathlib.Path) -> None:
    """A launch under nohup outlives its terminal, and one in the background Ctrl-C."""
    ignored = (signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(number, signal.SIG_IGN) for number in ignored]
    try:
        run = launch("--prompts", many_prompts(tmp_path))
    finally:
        for number, handler in zip(ignored, before, strict=True):
            signal.signal(number, handler)
    run.wait_for("alpha: preparing")
    for process in (run.process, *run.workers):
        for number in ignored:
            process.send_signal(number)
    run.wait_for("alpha: loading")
    assert all(worker.is_running() for worker in run.workers)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(10) == 128 + signal.SIGTERM
    run.assert_nothing_left()


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tiny: Tiny, launch, tmp_path: pathlib.Path) -> None:
    run = launch("--prompts", many_prompts(tmp_path))
    run.wait_for("alpha: loading")
    run.process.send_signal(signal.SIGKILL)
    run.process.wait(10)
    run.assert_nothing_left()
