"""The command `dance-jax bench`, against fake servers."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence

import psutil
import pytest

from dance_jax import command
from dance_jax.bench import main as bench
from dance_jax.bench.terminal import FAILED, WRONG
from dance_jax.models.directory import demo_dir
from tests.bench.fake_cluster import HOSTS, MODULE, ROOT, children, replace_launcher
from tests.bench.fake_server import MODEL, FakeServer, running

QUICKLY = ("--rate", "200", "--max-tokens", "9")


@pytest.fixture
def hosts(tmp_path: pathlib.Path) -> pathlib.Path:
    """A hosts file of two servers, with 1 and 2 devices."""
    path = tmp_path / "hosts.txt"
    path.write_text(HOSTS)
    return path


def measured(
    servers: Sequence[FakeServer], path: pathlib.Path, *arguments: str
) -> tuple[int, dict]:
    """The exit code and the JSON of a run against servers."""
    output = path / "out.json"
    with running(servers) as urls:
        code = bench.main([*urls, *arguments, "--output", str(output)])
    return code, json.loads(output.read_text())


def test_servers_at_urls(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    servers = [FakeServer(), FakeServer()]
    code, found = measured(servers, tmp_path, *QUICKLY, "--requests", "40", "--seed", "3")
    assert code == 0 and list(found) == ["machine", "setup", "load"]
    names = [f"127.0.0.1:{server.port}" for server in servers]
    assert [row["server"] for row in found["load"]] == [*names, "all"]
    assert [row["requests"] for row in found["load"]][2] == 40
    assert [row["failed"] for row in found["load"]] == [0, 0, 0]
    assert [len(server.prompts) for server in servers] == [
        row["requests"] for row in found["load"][:2]
    ]
    assert all(isinstance(prompt, str) for server in servers for prompt in server.prompts)
    assert found["setup"]["seed"] == 3 and found["setup"]["served_model_name"] == MODEL
    said = capsys.readouterr().out
    for word in ("TTFT", "ITL", "E2E", "p50", "p99", "output tokens/s", "failed", *names, "all"):
        assert word in said


def test_failed_requests_are_counted_and_told(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = [FakeServer(), FakeServer(last=b'data: {"error": {"message": "gone"}}\n\n')]
    code, found = measured(servers, tmp_path, *QUICKLY, "--requests", "12")
    rows = found["load"]
    assert code == 0 and rows[0]["failed"] == 0
    assert rows[1]["failed"] == rows[1]["requests"] == rows[2]["failed"] > 0
    assert "failed: gone" in capsys.readouterr().out
    with running(servers[1:]) as urls:
        assert bench.main([*urls, *QUICKLY, "--requests", "3"]) == FAILED
    assert "no request was answered" in capsys.readouterr().err


def test_prompts_of_a_file(tmp_path: pathlib.Path, hosts: pathlib.Path) -> None:
    prompts, servers = tmp_path / "prompts.jsonl", [FakeServer(), FakeServer()]
    lines = [{"prompt": "one", "max_tokens": 3}, {"prompt": "two", "server": "beta"}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    options = ("--prompts", str(prompts), "--hosts", str(hosts))
    _, found = measured(servers, tmp_path, *QUICKLY, *options, "--requests", "2")
    rows = found["load"]
    assert [row["server"] for row in rows] == ["alpha", "beta", "all"]
    assert {*servers[0].prompts} <= {"one"} and {*servers[1].prompts} <= {"two"}
    assert rows[2]["output_tokens"] == 3 * rows[0]["requests"] + 9 * rows[1]["requests"]


def test_a_trace_sets_lengths_in_tokens(tmp_path: pathlib.Path) -> None:
    trace, server = tmp_path / "trace.csv", FakeServer()
    rows = [f"2023-11-16 18:17:0{n}.0000000,{500 + n},{2 + n}" for n in range(4)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    options = ("--trace", str(trace), "--speedup", "100", "--model", str(demo_dir()))
    _, found = measured([server], tmp_path, *options)
    assert [len(prompt) for prompt in server.prompts] == [500, 501, 502, 503]
    assert found["load"][0]["output_tokens"] == 2 + 3 + 4 + 5


def test_servers_of_others(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They need not say a context, and may serve several models."""
    server = FakeServer(says_context=False, others=("another",))
    with running([server]) as urls:
        assert bench.main([*urls, "--requests", "1"]) == WRONG
        assert f"models are: {MODEL}, another" in capsys.readouterr().err
        assert bench.main([*urls, "--served-model-name", "none"]) == WRONG
        assert "exactly one model 'none' is needed" in capsys.readouterr().err
    server = FakeServer(says_context=False, others=("another",))
    options = ("--requests", "2", "--served-model-name", MODEL)
    assert measured([server], tmp_path, *QUICKLY, *options)[0] == 0


def test_the_key_is_that_of_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DANCE_JAX_API_KEY", "secret")
    server = FakeServer(key="secret")
    _, found = measured([server], tmp_path, *QUICKLY, "--requests", "2")
    assert len(server.prompts) == 2 and "secret" not in json.dumps(found)
    with running([FakeServer(key="other")]) as urls:
        assert bench.main(urls) == WRONG
    said = capsys.readouterr().err
    assert "HTTP 401: wrong key" in said and "set DANCE_JAX_API_KEY" in said


def test_a_cluster_is_started_for_the_run(
    monkeypatch: pytest.MonkeyPatch, hosts: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_launcher(monkeypatch, 2)
    monkeypatch.chdir(ROOT)
    assert bench.main(["--hosts", str(hosts), *QUICKLY, "--requests", "6", "--", "--x", "y"]) == 0
    said = capsys.readouterr().out
    assert "alpha, beta: starting at" in said and "ready after" in said and "beta" in said
    assert children() == []


def test_a_launcher_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, hosts: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_launcher(monkeypatch, 0)
    monkeypatch.chdir(ROOT)
    assert bench.main(["--hosts", str(hosts), "--requests", "1"]) == FAILED
    said = capsys.readouterr().err
    assert "ended with code 1" in said and "hosts.txt:3: no such memory" in said


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_cluster(number: signal.Signals, code: int, hosts: pathlib.Path) -> None:
    script = (
        "import sys; from dance_jax.bench import cluster, main; "
        f"cluster.LAUNCHER = (sys.executable, '-m', '{MODULE}', '2'); "
        f"sys.exit(main.main(['--hosts', '{hosts}', '--rate', '1e-6', '--requests', '1']))"
    )
    words = [sys.executable, "-u", "-c", script]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        assert "starting at" in process.stdout.readline()
        assert "ready after" in process.stdout.readline()
        (launcher,) = psutil.Process(process.pid).children()
        process.send_signal(number)
        assert process.wait() == code
    assert not launcher.is_running()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no servers are given"),
        ("a:1", "http://host:port is needed"),
        ("http://a:1/v1", "http://host:port is needed"),
        ("http://127.0.0.1:1", "cannot be reached"),
        ("http://a:1 --speedup 2", "--speedup needs --trace"),
        ("http://a:1 --trace a --prompts b", "give only one"),
        ("http://a:1 --trace a", "with --model"),
        ("http://a:1 --model a", "leave out --model"),
        ("--hosts a --trace a -- --model=b", "give --model before the --"),
        ("http://a:1 --trace no_such_file --model a", "no_such_file"),
        ("http://a:1 --prompts no_such_file", "no_such_file"),
        ("http://a:1 --output /no/such/folder/x", "does not exist"),
        ("http://a:1 --hosts examples/hosts.txt", "has 3 servers, but 1 URLs"),
        ("--hosts no_such_file", "no_such_file"),
        ("http://a:1 --duration 0.0001", "no request arrives"),
        ("http://a:1 --requests 1 -- --policy dance", "--policy: no server is launched"),
    ],
)
def test_options_that_are_wrong(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """From the console script on, which must pass on the -- too."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        command.main(["bench", *arguments.split()])
    assert ended.value.code == WRONG and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", ["--requests 0", "--rate -1", "--seed x", "--rate 1 --trace x"]
)
def test_what_the_parser_refuses(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["http://a:1", *arguments.split()])
    assert "usage: dance-jax bench" in capsys.readouterr().err


def test_a_wheel_s_packages_are_enough() -> None:
    """psutil and matplotlib are extras, and JAX would start slowly."""
    code = (
        "import sys, dance_jax.bench.main; print(*{'jax', 'psutil', 'matplotlib'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ
    )
    assert (done.returncode, done.stdout) == (0, "\n")
