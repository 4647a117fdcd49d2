"""The command line of benchmarks/serve.py, against fake servers."""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Sequence

import pytest

from benchmarks import serve
from benchmarks.serving import idle, long, prefix, soak, static
from dance_jax.bench.terminal import FAILED, WRONG
from dance_jax.bench.texts import Texts
from tests.bench.fake_cluster import HOSTS, children, replace_launcher
from tests.bench.fake_server import FakeServer, running


@pytest.fixture
def hosts(tmp_path: pathlib.Path) -> pathlib.Path:
    """A hosts file of two servers, with 1 and 2 devices."""
    path = tmp_path / "hosts.txt"
    path.write_text(HOSTS)
    return path


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten all measurements and repeat none."""
    for section in (idle, long, prefix):
        monkeypatch.setattr(section, "REPEATS", 1)
    monkeypatch.setattr(idle, "REST_S", 0.0)
    monkeypatch.setattr(static, "TURNS", 2)
    monkeypatch.setattr(soak, "IDLE_S", 0.1)
    monkeypatch.setattr(soak, "ASK_S", 0.05)


def measured(
    servers: Sequence[FakeServer], path: pathlib.Path, *arguments: str
) -> tuple[int, dict]:
    """The exit code and the JSON of a run with --url."""
    output = path / "out.json"
    with running(servers) as urls:
        code = serve.main(["--url", *urls, *arguments, "--output", str(output)])
    return code, json.loads(output.read_text())


def test_a_run_under_load(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    servers, plot = [FakeServer(), FakeServer()], tmp_path / "out.png"
    options = ("--requests", "40", "--rate", "200", "--max-tokens", "9", "--plot", str(plot))
    code, found = measured(servers, tmp_path, *options)
    assert code == 0
    rows = found["load"]
    assert [row["requests"] for row in rows][2] == 40 == sum(len(s.prompts) for s in servers)
    assert all(len(each.prompts) > 5 for each in servers)
    assert [row["failed"] for row in rows] == [0, 0, 0]
    assert rows[2]["output_tokens"] == sum(row["output_tokens"] for row in rows[:2]) <= 9 * 40
    assert plot.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    for word in ("TTFT", "TPOT", "ITL", "E2E", "p99", "output tokens/s", "failed", "all"):
        assert word in said


def test_a_trace_and_a_file_of_prompts(tmp_path: pathlib.Path) -> None:
    trace, prompts = tmp_path / "trace.csv", tmp_path / "prompts.jsonl"
    rows = [f"2023-11-16 18:17:0{n}.0000000,{5 + n},{2 + n}" for n in range(4)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    server = FakeServer()
    options = ("--trace", str(trace), "--speedup", "100", "--requests", "3")
    _, found = measured([server], tmp_path, *options)
    assert [len(prompt) for prompt in server.prompts] == [5, 6, 7]
    assert found["load"][0]["output_tokens"] == 2 + 3 + 4
    prompts.write_text('{"prompt": "Hello", "max_tokens": 3}\n{"prompt": "Hi", "max_tokens": 4}\n')
    server = FakeServer()
    _, found = measured([server], tmp_path, "--prompts", str(prompts), "--rate", "200")
    assert found["load"][0]["output_tokens"] == 7 and len(server.prompts) == 2


def test_sections_measure_what_they_say(tmp_path: pathlib.Path, hosts: pathlib.Path) -> None:
    servers = [FakeServer(), FakeServer()]
    options = ("--hosts", str(hosts), "--sections", "idle,static,long,prefix", "--duration", "0.2")
    code, found = measured(servers, tmp_path, *options, "--max-num-seqs", "4", "--batch-seqs", "4")
    assert code == 0  # without --check, missed targets do not matter
    assert found["idle"]["begin"]["p99"] == pytest.approx(0.001) and found["idle"]["cores"] is None
    assert len(found["static"]["ttft_ours"]) == len(found["static"]["ttft_batches"])
    assert found["static"]["capacity"] > 0 and found["static"]["failed"] == []
    ways = [(row["server"], row["others_busy"]) for row in found["long"]]
    assert ways == [("alpha", False), ("alpha", True), ("beta", False), ("beta", True)]
    assert all(row["itl"]["count"] > 100 and row["failed"] == [] for row in found["long"])
    assert [pair["server"] for pair in found["prefix"]["pairs"]] == ["alpha", "beta"]
    first, second = servers[0].prompts[-2:]
    assert len(first) == len(second) == prefix.SHARED + prefix.TAIL
    assert first[: prefix.SHARED] == second[: prefix.SHARED] and first != second
    # Requests are in proportion to devices: two turns of 4 and 8, each in batches and continuous.
    assert [len(each.prompts) >= 2 * 2 * 4 * n for n, each in enumerate(servers, 1)] == [True] * 2
    assert sum(len(prompt) == long.LONG for each in servers for prompt in each.prompts) == 4
    assert "soak" not in found and found["setup"]["devices"] == [1, 2]


def test_streams_and_long_prompts(tmp_path: pathlib.Path) -> None:
    servers = [FakeServer(), FakeServer()]
    measured(servers, tmp_path, "--sections", "long")
    for server in servers:
        # Four streams while the other server is idle, four while it is busy, and one that keeps
        # this server busy.
        lengths = collections.Counter(len(prompt) for prompt in server.prompts)
        assert lengths == {long.SHORT: 4 + 4 + 1, long.LONG: 2}


def test_rates_of_static_follow_what_runs_at_once() -> None:
    texts = Texts([[[1]], [[2]]])
    setting = serve.Setting(
        serve.Api([], "", 9), ("x", "y"), (8, 24), (8, 24), texts, 0, serve.Console()
    )
    coming = static._arrivals(setting, 4.0, 1000.0)
    assert len(coming) == pytest.approx(4000, rel=0.05)
    assert sum(each.server == 1 for each in coming) == pytest.approx(3000, rel=0.05)


def test_static_batches_are_of_the_devices(tmp_path: pathlib.Path, hosts: pathlib.Path) -> None:
    servers = [FakeServer(), FakeServer()]
    options = ("--hosts", str(hosts), "--sections", "static", "--duration", "0.01")
    with pytest.MonkeyPatch.context() as patched:
        # Without the continuous runs and the search for a rate, only the batches run.
        patched.setattr(static, "open_loop", lambda api, calls, done: nothing())
        patched.setattr(static, "FRACTIONS", ())
        measured(servers, tmp_path, *options, "--max-num-seqs", "5", "--batch-seqs", "3")
    assert [len(each.prompts) for each in servers] == [10, 20]
    assert servers[0].most_running <= 3 and servers[1].most_running <= 6


async def nothing() -> list:
    """Stands in for a run that gives no answers."""
    return []


@pytest.mark.parametrize(
    ("server", "missed"),
    [
        (FakeServer(), []),
        (FakeServer(margin=5e-4), []),
        (FakeServer(margin=0.5), ["soak: margin at a first difference"]),
        (
            FakeServer(metrics={"num_requests_running": 1.0}),
            ["soak: metrics of idle servers that are not 0"],
        ),
    ],
)
def test_a_soak(server: FakeServer, missed: list[str], tmp_path: pathlib.Path) -> None:
    code, found = measured([server], tmp_path, "--check", "--sections", "soak", "--requests", "40")
    assert [target["name"] for target in found["targets"] if target["missed"]] == missed
    assert code == (FAILED if missed else 0)
    section = found["soak"]
    assert section["hung_up"] == sum(section["wrong"].values()) == 2
    assert section["compared"] == 36 and section["failed"] == section["taken"] == []
    assert len(server.prompts) == 36 + 38
    assert max(len(prompt) for prompt in server.prompts) <= soak.PROMPTS[1]
    differ = 0 if server.margin is None else sum(c.max_tokens > 1 for c in greedy(server))
    assert len(section["differences"]) == differ
    assert section["growth"] is None  # the processes behind a URL are unknown


def greedy(server: FakeServer) -> list[serve.Call]:
    """The soak's calls that are not hung up; a disturbed server answers them in two ways."""
    texts = serve.read_texts(serve.DEMO_TASKS, 1, serve.Tokenizer.load(serve.demo_dir()))
    api = serve.Api([], "", server.context)
    setting = serve.Setting(api, ("x",), (8,), (8,), texts, 0, serve.Console())
    calls = soak._calls(setting, 40)
    return [call for call in calls if call is not None and call.hang_up_after is None]


def test_a_cluster_is_started_watched_and_ended(
    monkeypatch: pytest.MonkeyPatch, hosts: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    replace_launcher(monkeypatch, 2)
    output, plot = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--hosts", str(hosts), "--sections", "soak", "--requests", "40"]
    code = serve.main([*arguments, "--check", "--output", str(output), "--plot", str(plot)])
    found = json.loads(output.read_text())
    assert found["soak"]["samples"][-1]["done"] == 40
    assert found["soak"]["samples"][-1]["resident"] > 1e6
    missed = [target["name"] for target in found["targets"] if target["missed"]]
    assert (code, missed) == (0, []) and plot.exists()
    assert children() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--speedup 2", "--speedup needs --trace"),
        ("--trace a --prompts b", "give only one"),
        ("--check --rate 2", "--rate applies only to a run under load"),
        ("--check --max-tokens 2", "--max-tokens applies only to a run under load"),
        ("--sections soak --duration 2", "--duration applies only to the section static"),
        ("--sections static --url http://a:1", "needs --hosts too"),
        ("--url a:1", "http://host:port is needed"),
        ("--url http://a:1 --output /no/such/folder/x", "does not exist"),
        ("--url http://a:1 --hosts examples/hosts.txt", "has 3 servers, but 1 URLs"),
        ("--url http://a:1 --duration 0.0001", "no request arrives"),
        ("--tasks a --prompts b", "--tasks and --prompts"),
        ("--tasks no_such_folder", "no *.jsonl files"),
        ("--url http://a:1 --requests 1 -- --policy dance", "no server is launched"),
    ],
)
def test_options_that_are_wrong(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(arguments.split()) == WRONG
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", ["--sections none", "--requests 0", "--rate -1", "--rate 1 --trace x"]
)
def test_what_the_parser_refuses(arguments: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        serve.main(arguments.split())
