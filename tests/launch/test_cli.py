"""What the command refuses before anything starts, and what the command prints."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import threading
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import dance_jax.launch.__main__ as launch
from dance_jax.config import ClusterSpec, RebalanceOptions, ServeOptions, UserError
from dance_jax.engine.sequence import OutputDelta
from dance_jax.launch.cli import start
from dance_jax.launch.cli.options import parser, rebalance_options
from dance_jax.launch.cli.prompts import Prompt
from dance_jax.launch.cli.stream import Startup, Stream, printable
from dance_jax.launch.planning.hosts import read_hosts
from dance_jax.launch.preflight.run import Preflight
from dance_jax.launch.rebalance.state import ServiceState
from dance_jax.launch.rebalance.workload import Statistics
from dance_jax.launch.worker import cores
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import ensure_converted
from dance_jax.placement.activations import Activations
from dance_jax.placement.core import Placement
from dance_jax.placement.devices import spread
from tests.launch.tiny import EXPERTS, HOSTS, LAYERS, write_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("cli")
    write_model(folder / "model")
    (folder / "hosts.txt").write_text(HOSTS)
    (folder / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    return folder


@pytest.fixture
def run(files: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    """Runs the command in this process; no test here may start a server."""
    monkeypatch.setattr(launch.signals, "handle", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "200")

    def no_cluster(*_: object, **__: object) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr(start, "Cluster", no_cluster)

    def command(*options: object, hosts: object = "hosts.txt", model: object = "model"):
        words = ["--hosts", files / str(hosts), "--model", files / str(model)]
        words += ["--cache-dir", files / "cache", *options]
        code = launch.main(list(map(str, words)))
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_dry_run_prints_the_plan_alone(run) -> None:
    code, out, err = run("--dry-run")
    assert (code, err) == (0, "")
    for words in ("alpha", "beta", "gamma", "placing experts (latency)", "policy optimal", "14"):
        assert words in out
    assert "No activations were given" in out


def test_conversion_is_said_once(run, files: pathlib.Path) -> None:
    write_model(files / "other", seed=5)
    assert "on first use" not in run("--dry-run", model="other")[1]
    assert "on first use" in run("--preflight", model="other")[1]
    assert "on first use" not in run("--preflight", model="other")[1]


@pytest.mark.parametrize(
    "options",
    [
        ("--bind", "0.0.0.0"),
        ("--port", "80"),
        ("--api-key", "k"),
        ("--drain-seconds", "3"),
        ("--max-queue", "9"),
        ("--served-model-name", "m"),
        ("--rebalance-interval", "9"),
        ("--rebalance-policy", "dance"),
        ("--half-life", "0"),
        ("--state-dir", "kept"),
        ("--rebalance-dry-run",),
    ],
)
def test_what_is_for_serving_is_refused_for_a_batch(run, files, options) -> None:
    code, _, err = run("--prompts", files / "prompts.jsonl", *options)
    assert code == 2
    assert f"{options[0]} applies to serving, but --prompts runs a batch" in err


@pytest.mark.parametrize(
    "options", [("--output", "out"), ("--max-tokens", "5"), ("--save-activations", "out.npz")]
)
def test_what_is_for_a_batch_is_refused_for_serving(run, options) -> None:
    code, _, err = run(*options)
    assert code == 2 and f"{options[0]} needs --prompts" in err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServeOptions]:
    """Records the options of services that are made; none of them starts."""
    made: list[ServeOptions] = []

    def service(options: ServeOptions, *_: object, **__: object) -> None:
        made.append(options)
        raise UserError("far enough")

    monkeypatch.setattr(start, "IndependentService", service)
    monkeypatch.delenv("DANCE_JAX_API_KEY", raising=False)
    return made


def test_without_prompts_it_serves(run, started: list[ServeOptions]) -> None:
    assert "far enough" in run()[2]
    assert started == [ServeOptions("model")]
    run(
        "--bind", "::1", "--port", "99", "--api-key", "k", "--drain-seconds", "0.5",
        "--max-queue", "7", "--served-model-name", "org/name",
    )  # fmt: skip
    assert started[1] == ServeOptions("org/name", "::1", 99, "k", drain_seconds=0.5, max_queue=7)


def test_when_experts_move() -> None:
    def found(*words: str) -> RebalanceOptions:
        return rebalance_options(parser().parse_args(["--hosts", "h", *words]))

    assert found() == RebalanceOptions()
    words = "--rebalance-interval 9 --rebalance-policy dance --half-life 60 --rebalance-dry-run"
    assert found(*words.split()) == RebalanceOptions(9.0, "dance", 60.0, None, True)
    assert found("--half-life", "0").half_life_s is None
    with pytest.raises(UserError, match="--state-dir /dev/null/x: cannot be created"):
        found("--state-dir", "/dev/null/x")


def test_a_service_goes_on_where_one_before_ended(run, files: pathlib.Path) -> None:
    assert (
        "experts are placed from scratch" not in run("--dry-run", "--state-dir", files / "kept")[1]
    )
    spec = read_hosts(files / "hosts.txt")
    held = np.zeros((3, LAYERS, EXPERTS), bool)
    held[0, 0, :13] = held[1, 1, :10] = held[2, 0, 13:] = held[2, 1, 10:] = True
    layout = spread(Placement(held), spec.devices, [14, 11, 10])
    counts = np.zeros(held.shape)
    counts[:, 0, :13] = 1
    statistics = Statistics(counts, (np.zeros((0, LAYERS, 4), np.int16),) * 3)
    path = ensure_converted(files / "model", files / "cache" / "models")
    fingerprint = Checkpoint.open(path).fingerprint
    ServiceState(spec.names, fingerprint, layout, statistics).save(files / "kept")
    code, out, err = run("--dry-run", "--state-dir", files / "kept")
    assert (code, err) == (0, "")
    assert "policy as before" in out and "13 0" in out and "1.000" in out
    ServiceState(spec.names, "another", layout, statistics).save(files / "kept")
    code, out, _ = run("--dry-run", "--state-dir", files / "kept")
    assert code == 0 and "policy optimal" in out
    assert "another model; experts are placed from scratch" in " ".join(out.split())


def test_the_key_of_users_comes_from_the_environment(run, started, monkeypatch) -> None:
    monkeypatch.setenv("DANCE_JAX_API_KEY", "from-there")
    run()
    run("--api-key", "given")
    assert [options.api_key for options in started] == ["from-there", "given"]
    monkeypatch.setenv("DANCE_JAX_API_KEY", "two words")
    code, _, err = run()
    assert (
        code == 2
        and "DANCE_JAX_API_KEY: the key must be visible ASCII" in err
        and "two words" not in err
    )


def test_the_cache_has_the_size_that_is_asked_for(run, files: pathlib.Path) -> None:
    code, _, err = run("--dry-run", "--kv-memory", "5B")
    assert code == 2 and "kv_memory=5:" in err
    assert run("--dry-run", "--kv-memory", "64MiB", "--max-num-seqs", "2")[0] == 0


def test_bad_files_are_named(run, files: pathlib.Path) -> None:
    (files / "bad-hosts").write_text("alpha address=localhost experts=3 devises=2\n")
    (files / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "server": "delta"}\n')
    (files / "empty").mkdir(exist_ok=True)
    np.save(files / "plain.npy", np.ones(3))
    cases = [
        (run("--dry-run", hosts="bad-hosts"), f"{files / 'bad-hosts'}:1: unknown key 'devises'"),
        (run("--dry-run", hosts="none"), f"{files / 'none'}: "),
        (run("--prompts", files / "bad.jsonl"), f"{files / 'bad.jsonl'}:2: server: 'delta'"),
        (run("--prompts", files / "none.jsonl"), f"{files / 'none.jsonl'}: "),
        (run("--dry-run", model="nowhere"), str(files / "nowhere")),
        (run("--dry-run", model="empty"), str(files / "empty")),
        (run("--dry-run", "--activations", files / "none.npz"), f"{files / 'none.npz'}: "),
        (
            run("--prompts", files / "prompts.jsonl", "--output", files / "no" / "out"),
            f"the folder {files / 'no'} does not exist",
        ),
        (run("--dry-run", "--max-model-len", "300"), "256"),
        (run("--dry-run", "--log-dir", files / "hosts.txt"), "--log-dir"),
        # Nobody can make a file here, not even root.
        (run("--log-dir", "/proc"), "--log-dir /proc: no file can be written there"),
        (run("--dry-run", "--cache-dir", files / "hosts.txt"), "hosts.txt: is a file"),
        (run("--dry-run", "--trace", files / "no" / "trace.json"), "--trace"),
        (
            run("--prompts", files / "prompts.jsonl", "--output", files / "prompts.jsonl"),
            "is also the file of --prompts",
        ),
        (run("--dry-run", "--activations", files / "plain.npy"), f"{files / 'plain.npy'}: "),
    ]
    for (code, _, err), words in cases:
        assert code == 2, (err, words)
        assert words in err


def test_torn_weights_are_named(run, files: pathlib.Path) -> None:
    torn = write_model(files / "torn", seed=7)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = run("--dry-run", model="torn")
    assert code == 2 and str(weights) in err


def test_a_torn_tokenizer_is_named_before_anything_is_converted(run, files: pathlib.Path) -> None:
    torn = write_model(files / "torn-tokenizer", seed=8)
    (torn / "tokenizer.json").write_text("{")
    code, out, err = run("--preflight", model="torn-tokenizer")
    assert code == 2 and str(torn / "tokenizer.json") in err
    assert "on first use" not in out


def test_too_little_memory(run, files: pathlib.Path) -> None:
    (files / "small").write_text("alpha address=localhost experts=20\n")
    code, _, err = run("--dry-run", hosts="small")
    assert code == 2 and "12 slots are missing" in err and "bytes" in err


def test_activations_of_another_model(run, files: pathlib.Path) -> None:
    counts = np.ones((3, LAYERS, EXPERTS), np.int64)
    Activations(("alpha", "beta", "gamma"), counts, "0123").save(files / "foreign.npz")
    code, _, err = run("--dry-run", "--activations", files / "foreign.npz")
    assert code == 2 and "another model" in err


@pytest.fixture
def far(files: pathlib.Path, monkeypatch) -> list[str]:
    """Hosts over ssh whose rates a preflight finds; the result lists what was done, in order."""
    (files / "far").write_text(HOSTS.replace("localhost", "far.example").replace("500Mbps", "auto"))
    done: list[str] = []

    def preflight(spec, **options: Any) -> Preflight:
        done.append(f"asked about {len(options['needs'])} servers")
        servers = tuple(dataclasses.replace(server, bandwidth=7e6) for server in spec.servers)
        return Preflight(ClusterSpec(servers), (), options["needs"], {}, ())

    def place(spec, *_: object) -> None:
        done.append(f"placed at {[server.bandwidth for server in spec.servers]} bps")
        raise UserError("far enough")

    monkeypatch.setattr("dance_jax.launch.preflight.run.run_preflight", preflight)
    monkeypatch.setattr("dance_jax.launch.preflight.report.print_preflight", lambda *_: None)
    monkeypatch.setattr(launch, "make_plan", place)
    return done


def test_experts_are_placed_once_by_what_the_preflight_measured(run, files, far) -> None:
    code, _, err = run("--prompts", files / "prompts.jsonl", hosts="far")
    assert code == 2 and "far enough" in err
    asked, placed = far
    assert asked == "asked about 3 servers"
    assert placed == "placed at [7000000.0, 7000000.0, 7000000.0] bps"


def test_a_preflight_alone_places_nothing(run, far) -> None:
    assert run("--preflight", hosts="far")[0] == 0
    assert far == ["asked about 3 servers"]


def test_a_dry_run_places_and_asks_nobody(run, far) -> None:
    assert "far enough" in run("--dry-run", hosts="far")[2]
    assert far == ["placed at [None, None, None] bps"]


def test_what_is_wrong_here_is_said_before_anybody_is_asked(run, files, far) -> None:
    counts = np.ones((3, LAYERS, EXPERTS), np.int64)
    Activations(("alpha", "beta", "gamma"), counts, "0123").save(files / "other.npz")
    code, _, err = run("--preflight", "--activations", files / "other.npz", hosts="far")
    assert code == 2 and "another model" in err
    (files / "far").write_text("alpha address=far.example experts=20\n")
    code, _, err = run("--preflight", hosts="far")
    assert code == 2 and "12 slots are missing" in err
    assert far == []


@pytest.mark.parametrize(
    "options",
    [
        ["--max-tokens", "0"],
        ["--max-tokens", "9" * 30],
        ["--dtype", "int4"],
        ["--policy", "best"],
        ["--max-num-seqs", "0"],
        ["--kv-memory", "5"],
        ["--drain-seconds", "-1"],
        ["--port", "65536"],
        ["--bind", ""],
        ["--colour", "x"],
    ],
)
def test_wrong_options(run, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_cores_are_shared_in_proportion() -> None:
    assert cores.share([0, 1], [1, 1, 2]) == [[0], [0], [1]]
    assert cores.share([5], [1, 3]) == [[5], [5]]
    assert cores.share(list(range(8)), [1, 1, 2]) == [[0, 1], [2, 3], [4, 5, 6, 7]]
    assert cores.share([], [1, 2]) == [[], []]


def test_cores_are_limited_within_and_free_afterwards() -> None:
    """Threads made inside are free again as well: pools are limited, threads are not pinned."""
    before = os.sched_getaffinity(0)
    done = threading.Event()
    with cores.limited([min(before)]):
        assert os.sched_getaffinity(0) == {min(before)}
        thread = threading.Thread(target=done.wait)
        thread.start()
    assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(thread.native_id or 0) == before
    done.set()
    thread.join()
    with cores.limited([]):
        assert os.sched_getaffinity(0) == before


def test_streams_interleave_in_whole_lines() -> None:
    console = Console(file=io.StringIO(), width=120)
    prompts = [Prompt(0, "p", 0, 9), Prompt(1, "q", 2, 9)]
    with Stream(console, ("alpha", "beta", "gamma"), prompts) as stream:
        for prompt, text, reason in (
            (prompts[0], "one ", None),
            (prompts[1], "eins\nzw", None),
            (prompts[0], "two", "length"),
            (prompts[1], "ei \x1b[31mrot [bold]", "stop"),
        ):
            delta = OutputDelta(str(prompt.index), 0, text, [1], finish_reason=reason)
            stream.update(prompt, delta)
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "gamma 1 | eins",
        "alpha 0 | one two",
        "alpha 0 | [length]",
        "gamma 1 | zwei \ufffd[31mrot [bold]",
    ]


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert (
        printable("a\x1b[2J\r\x07\tb\n\u00fc \u65e5") == "a\ufffd[2J\ufffd\ufffd\tb\n\u00fc \u65e5"
    )


def test_startup_lines() -> None:
    console = Console(file=io.StringIO(), width=120)
    with Startup(console, ["a", "b"]) as startup:
        startup.update("a", "compiling", 1, 3)
        startup.update("a", "compiling", 1, 3)
        startup.update("b", "ready", 0, 0)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split("  ")[-1] for line in lines] == ["a: compiling 1 of 3", "b: ready"]


def test_prompts_file_is_utf8(run, files: pathlib.Path) -> None:
    (files / "latin.jsonl").write_bytes(json.dumps({"prompt": "\u00fc"}).encode() + b"\xff")
    code, _, err = run("--prompts", files / "latin.jsonl")
    assert code == 2 and "latin.jsonl" in err
