"""What a machine answers to a preflight: the process, its facts, and measured links."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dance_jax.launch.agent.process import MARK
from dance_jax.launch.preflight import link, model_state, probe
from dance_jax.launch.preflight.at_once import at_once
from dance_jax.launch.preflight.disk import read_rate
from dance_jax.launch.preflight.messages import (
    AskClock,
    AskMachine,
    Clock,
    Listen,
    Listening,
    Machine,
    Measure,
    Measured,
    Peer,
    Refused,
    decode_reply,
    encode,
)
from dance_jax.models.convert import convert, outline
from dance_jax.models.directory import demo_dir
from tests.launch.launched import eventually, gone
from tests.launch.tiny import write_model

COMMAND = [sys.executable, "-m", "dance_jax.launch.preflight.probe"]


def question(**changes: object) -> AskMachine:
    fields = {
        "address": "127.0.0.1",
        "names": ["localhost"],
        "ports": [0],
        "model": None,
        "cache_dir": None,
        "platform": "cpu",
    }
    return AskMachine(**(fields | changes))  # pyright: ignore[reportArgumentType]


def machine(**changes: object) -> Machine:
    reply = probe.answer(question(**changes))
    assert isinstance(reply, Machine)
    return reply


# The process.


def test_answers_line_by_line_and_ends_with_its_input() -> None:
    lines = [encode(AskClock()), b"{", encode(question(names=["127.0.0.1", "nowhere.invalid"]))]
    done = subprocess.run(COMMAND, input=b"\n".join(lines) + b"\n", capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.splitlines()
    assert all(line.startswith(MARK) for line in out)
    clock, refused, facts = [decode_reply(line.removeprefix(MARK)) for line in out]
    assert isinstance(clock, Clock) and abs(clock.time - time.time()) < 60
    assert isinstance(refused, Refused) and "does not know this question" in refused.why
    assert isinstance(facts, Machine)
    assert facts.resolved["127.0.0.1"].addresses == ["127.0.0.1"]
    assert (
        facts.resolved["nowhere.invalid"].problem
        and not facts.resolved["nowhere.invalid"].addresses
    )
    assert facts.source_hash == probe.source_hash(pathlib.Path(probe.__file__).parents[2])


def test_ends_soon_even_when_it_is_busy() -> None:
    """A peer that never answers would keep the process busy longer than its input lasts."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        peer = Peer("127.0.0.1", silent.getsockname()[1])
        request = Measure(peers=[peer], token="x" * link.TOKEN_CHARACTERS, seconds=1.0)
        process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert process.stdin is not None
        process.stdin.write(encode(request) + b"\n")
        process.stdin.flush()
        with silent.accept()[0]:
            began = time.monotonic()
            process.communicate(timeout=30)
        assert time.monotonic() - began < link.STALL_TIMEOUT_S


def test_what_it_starts_ends_with_it(tmp_path: pathlib.Path) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, env=environment)
    assert process.stdin is not None
    process.stdin.write(encode(question(platform="cuda")) + b"\n")
    process.stdin.flush()
    pid = tmp_path / "pid"
    pid.touch()
    child = psutil.Process(int(eventually(pid.read_text)))
    process.stdin.close()
    process.wait(30)
    assert gone([child], 5)


def test_ends_when_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from dance_jax.launch.preflight import probe; probe.IDLE_TIMEOUT_S = 0.1; probe.main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert process.wait(30) == 0


def test_needs_neither_jax_nor_numpy() -> None:
    code = (
        "import sys, dance_jax.launch.preflight.probe; "
        "sys.exit(any(name in sys.modules for name in ('jax', 'numpy', 'ml_dtypes')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Facts.


def test_versions_and_memory() -> None:
    facts = machine()
    assert set(facts.packages) == {*probe.PACKAGES, *probe.GPU_PACKAGES}
    assert facts.packages["jax"] and facts.python.endswith(platform.python_version())
    assert facts.memory_free and 0 < facts.memory_free <= psutil.virtual_memory().total
    assert facts.gpus is None and facts.cores >= 1
    assert facts.machine_id and facts.network_id.startswith(facts.machine_id)


def test_ports_free_taken_and_not_of_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        free, used = machine(ports=[0, port]).ports
        assert free.port > 0 and not free.problem
        assert used.port == port and "in use" in used.problem
    (freed,) = machine(ports=[port]).ports
    assert not freed.problem
    (foreign,) = machine(address="192.0.2.1").ports
    assert "assign" in foreign.problem
    refused = probe.answer(Listen(address="192.0.2.1", token="", seconds=1))
    assert isinstance(refused, Refused) and "assign" in refused.why


@pytest.mark.parametrize("address", ["nowhere.invalid", "x" * 80 + ".invalid"])
def test_an_address_without_meaning(address: str) -> None:
    facts = machine(address=address)
    assert facts.resolved[address].problem == facts.ports[0].problem != ""


def test_a_slow_resolver_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LOOKUP_TIMEOUT_S", 0.2)
    resolve = socket.getaddrinfo

    def slow(name: str, *arguments, **keywords):
        if name == "slow":
            time.sleep(2)
        return resolve(name, *arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    found = machine(names=["slow", "localhost"]).resolved
    assert found["slow"].problem == "timed out" and found["localhost"].addresses


def test_gpus(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe.gpus_free() == ([], "nvidia-smi was not found")
    fake = tmp_path / "nvidia-smi"
    fake.touch(0o755)
    for script, wanted in (
        ("echo '0, 81000'; echo '1, 5'", [(0, 81000 << 20), (1, 5 << 20)]),
        ("echo gone wrong >&2; exit 9", "nvidia-smi failed: gone wrong"),
        ("echo nonsense", "the output of nvidia-smi cannot be parsed"),
    ):
        fake.write_text(f"#!/bin/sh\n{script}\n")
        gpus, problem = probe.gpus_free()
        if isinstance(wanted, str):
            assert not gpus and problem.startswith(wanted)
        else:
            assert [(gpu.index, gpu.free) for gpu in gpus] == wanted and not problem


def test_a_cache_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    assert machine(cache_dir=str(tmp_path / "new" / "cache")).cache_problem == ""
    (tmp_path / "file").touch()
    assert "file cannot be written" in machine(cache_dir=str(tmp_path / "file")).cache_problem


def test_source_hash_follows_names_and_contents(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.py").write_text("1")
    first = probe.source_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("not a source")
    assert probe.source_hash(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    second = probe.source_hash(tmp_path)
    (tmp_path / "b.py").write_text("2")
    assert len({first, second, probe.source_hash(tmp_path)}) == 3


# The model.


def test_models_that_are_equal_and_not(tmp_path: pathlib.Path) -> None:
    one, other = write_model(tmp_path / "one"), tmp_path / "other"
    shutil.copytree(one, other)
    first, second = model_state.model_state(one), model_state.model_state(other)
    assert first.kind == "hf" and not first.problem
    assert (first.index, first.definition) == (second.index, second.definition)
    demo = model_state.model_state(None)
    assert pathlib.Path(demo.path) == demo_dir() and demo.kind == "hf"
    assert demo.index != first.index and demo.definition != first.definition
    converted = model_state.model_state(convert(one, tmp_path / "converted"))
    assert converted.kind == "converted" and not converted.problem
    assert converted.definition == first.definition
    assert converted.fingerprint == outline(one).fingerprint
    (other / "tokenizer.json").write_text("{}")
    assert model_state.model_state(other).definition != first.definition


def test_models_with_something_missing(tmp_path: pathlib.Path) -> None:
    def problem(path: pathlib.Path) -> str:
        return model_state.model_state(path).problem

    assert "the directory does not exist" in problem(tmp_path / "nothing")
    assert "config.json" in problem(tmp_path)
    model = write_model(tmp_path / "model")
    (weights,) = model.glob("*.safetensors")
    converted = convert(model, tmp_path / "converted")
    index = {"weight_map": {"a": weights.name, "b": "model-00002.safetensors"}}
    (model / model_state.INDEX).write_text(json.dumps(index))
    assert "1 of 2 weight files are missing: model-00002" in problem(model)
    (model / model_state.INDEX).write_text("{")
    assert "cannot be parsed" in problem(model)
    (model / model_state.INDEX).unlink()
    weights.unlink()
    assert "no safetensors" in problem(model)
    (converted / "config.json").unlink()
    assert "config.json is missing" in problem(converted)
    (converted / model_state.MANIFEST).write_text("{}")
    assert "convert the model again" in problem(converted)


@given(part=st.floats(0, 1, exclude_max=True))
def test_torn_weights_are_noticed(tiny_weights: pathlib.Path, part: float) -> None:
    content = tiny_weights.read_bytes()
    torn = tiny_weights.parent / "torn"
    torn.mkdir(exist_ok=True)
    (torn / "config.json").write_text("{}")
    (torn / "model.safetensors").write_bytes(content[: int(part * len(content))])
    state = model_state.model_state(torn)
    assert "truncated" in state.problem or "incomplete" in state.problem


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    (path,) = write_model(tmp_path_factory.mktemp("weights") / "model").glob("*.safetensors")
    return path


# Links.


def listening(token: str, seconds: float = 30.0) -> Peer:
    reply = probe.answer(Listen(address="127.0.0.2", token=token, seconds=seconds))
    assert isinstance(reply, Listening)
    return Peer("127.0.0.2", reply.port)


def new_token() -> str:
    return secrets.token_hex(link.TOKEN_CHARACTERS // 2)


def test_round_trips_and_rates() -> None:
    token = new_token()
    peers = [listening(token), listening(token)]
    reply = probe.answer(Measure(peers=peers, token=token, seconds=0.2))
    assert isinstance(reply, Measured) and len(reply.links) == 2
    for found in reply.links:
        assert not found.problem
        for value in (found.rtt, found.sent, found.received):
            assert value is not None and value > 0 and math.isfinite(value)
    (quick,) = link.measure(peers[:1], token, 0.0)
    assert quick.rtt and quick.sent is None and quick.received is None


def test_a_stranger_is_turned_away() -> None:
    peer = listening(new_token())
    (found,) = link.measure([peer], new_token(), 0.1)
    assert found.problem in ("closed the connection", "connection reset by peer")
    with socket.create_connection((peer.address, peer.port), 5) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n" * 8)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""


def test_a_listener_ends_by_itself() -> None:
    token = new_token()
    peer = listening(token, seconds=0.1)
    assert eventually(lambda: link.measure([peer], token, 0.0)[0].problem == "connection refused")


def test_peers_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CONNECT_TIMEOUT_S", 0.4)
    monkeypatch.setattr(link, "STALL_TIMEOUT_S", 0.4)
    token = new_token()
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        socket.create_server(("127.0.0.1", 0), backlog=0) as full,
    ):
        # Like a firewall that drops packets: the queue is full, and nothing answers any more.
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        peers = [Peer(*silent.getsockname()), Peer(*full.getsockname()), listening(token)]
        peers += [Peer("127.0.0.1", 1), Peer("nowhere.invalid", 1)]
        found = link.measure(peers, token, 0.0)
        for each in waiting:
            each.close()
    problems = [each.problem for each in found]
    assert problems[:4] == ["timed out", "timed out", "", "connection refused"]
    assert "not known" in problems[4] or "resolution" in problems[4]


# Calls at once.


def test_at_once_keeps_order_and_reports_what_failed() -> None:
    def fail() -> int:
        raise ValueError("no")

    late = threading.Event()
    one, failed, slow = at_once([lambda: 1, fail, lambda: late.wait(30)], 0.2)
    late.set()
    assert one == 1 and isinstance(failed, ValueError) and isinstance(slow, TimeoutError)
    assert at_once([]) == []


# The disk.


def test_the_rate_of_the_disk(tmp_path: pathlib.Path) -> None:
    """Of the largest file, if it is large enough to tell."""
    assert read_rate(tmp_path) is None and read_rate(tmp_path / "missing") is None
    weights = tmp_path / "parts" / "weights.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(bytes(1 << 20))
    assert read_rate(tmp_path) is None
    weights.write_bytes(bytes(24 << 20))
    for path in (tmp_path, weights):
        rate = read_rate(path)
        assert rate is not None and 1e6 < rate < 1e12
