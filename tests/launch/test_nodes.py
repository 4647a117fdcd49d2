"""--node-rank: one launcher per server, without ssh; here on three loopback addresses."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
from collections.abc import Callable, Iterator

import psutil
import pytest

from dance_jax.launch.agent.nodes import NodeProcess, Nodes
from dance_jax.launch.agent.role import KEY_VARIABLE
from dance_jax.launch.control import node_protocol
from dance_jax.launch.control.channel import (
    ControlConnection,
    ControlListener,
    new_key,
    node_identity,
)
from dance_jax.launch.planning.hosts import parse_hosts
from tests.launch.cold_run import Tiny
from tests.launch.launched import completion, eventually, free_ports, kill_all, only_child
from tests.launch.test_cluster import many_prompts
from tests.launch.tiny import HOSTS

KEY = "an example of a key that all nodes have"
Start = Callable[..., psutil.Popen]


@pytest.fixture
def start(tiny: Tiny, tmp_path: pathlib.Path) -> Iterator[Start]:
    """start(rank, options..., key=...): starts a node's launcher, which logs to node-RANK."""
    hosts = tmp_path / "hosts.txt"
    lines = HOSTS.splitlines()
    addressed = [
        line.replace("address=localhost", f"address=127.0.0.{n + 1}")
        for n, line in enumerate(line for line in lines if "address=" in line)
    ]
    hosts.write_text("\n".join(addressed))
    port = str(free_ports(1))
    started: list[psutil.Popen] = []

    def run(rank: int, *options: str | os.PathLike[str], key: str = KEY) -> psutil.Popen:
        command = tiny.command("--node-rank", str(rank), "--control-port", port, *options)
        command[command.index("--hosts") + 1] = str(hosts)
        with open(tmp_path / f"node-{rank}", "ab") as output:
            process = psutil.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {KEY_VARIABLE: key, "COLUMNS": "200"},
            )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.is_running():
            kill_all([*process.children(recursive=True), process])
        process.wait()


def said(folder: pathlib.Path, rank: int, text: str, seconds: float = 120) -> None:
    """Waits until a node's launcher has printed `text`."""
    shown = folder / f"node-{rank}"
    assert eventually(lambda: text in shown.read_text(), seconds), shown.read_text()


def test_nodes_answer_as_one_launch(tiny: Tiny, start: Start, tmp_path: pathlib.Path) -> None:
    wrong = start(2, key="the key of somebody else altogether")
    output = tmp_path / "out.jsonl"
    first = start(
        0, "--policy", "uniform", "--prompts", tiny.folder / "prompts.jsonl", "--max-tokens", "8",
        "--output", output,
    )  # fmt: skip
    assert wrong.wait(60) == 2
    assert "refuses this node's key" in (tmp_path / "node-2").read_text()
    others = [start(1), start(2)]
    said(tmp_path, 0, "all servers can work together")
    children = [child for node in (first, *others) for child in node.children(recursive=True)]
    assert first.wait(200) == 0, (tmp_path / "node-0").read_text()
    codes = [node.wait(10) for node in others]
    assert codes == [0, 0], [(tmp_path / f"node-{n}").read_text() for n in (0, 1, 2)]
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    for line, before in zip(lines, tiny.lines, strict=True):
        assert {**line, "metrics": None} == {**before, "metrics": None}


def test_a_node_that_is_started_again_gets_a_process_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Node 0 sends a start only to a node that is there to get it."""
    monkeypatch.setattr("dance_jax.launch.agent.nodes.RECONNECT_S", 0.3)
    key, spec = new_key(), parse_hosts("alpha experts=1\nbeta experts=1")
    with contextlib.closing(ControlListener(key, [node_identity(1)])) as listener:
        nodes = Nodes(spec, listener)

        def begin() -> ControlConnection:
            node = ControlConnection(listener.private, key, node_identity(1))
            node.send(node_protocol.encode(node_protocol.Hello(os.getpid())))
            return node

        def commands(node: ControlConnection) -> list[node_protocol.Command]:
            assert eventually(lambda: nodes.pump(10) or node.waits(), 5)
            return [node_protocol.decode_command(each) for each in node.arrived()]

        def launched() -> NodeProcess:
            return nodes.start(1, "some.module", answers=False, drains=True)

        def gone() -> bool:
            nodes.check()
            return process.ended is not None

        node = begin()
        nodes.meet(lambda *_: None)
        process = launched()
        assert commands(node) == [node_protocol.Start(1, "some.module", False, True)]
        node.close()
        assert eventually(gone, 10)
        assert "cannot be reached any more" in process.fate()
        process = launched()
        assert process.ended is not None
        assert "is not connected" in process.fate()
        again = begin()
        assert eventually(lambda: nodes.pump(10) or launched().ended is None, 5)
        (command,) = commands(again)
        assert isinstance(command, node_protocol.Start)
        # Started again before node 0 has missed it.
        process = nodes._processes[1]
        again.close()
        with contextlib.closing(begin()):
            assert eventually(lambda: nodes.pump(10) or process.ended is not None, 5)
        assert "was started again" in process.fate()


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["first", "interrupt", "node", "worker"])
def test_all_nodes_end_when_one_does(
    lost: str, start: Start, tmp_path: pathlib.Path, tiny: Tiny
) -> None:
    nodes = [
        start(0, "--policy", "uniform", "--prompts", many_prompts(tmp_path)),
        start(1),
        start(2),
    ]
    said(tmp_path, 0, " | ")
    processes = [child for node in nodes for child in node.children(recursive=True)]
    victim = {"first": nodes[0], "worker": only_child(nodes[1])}.get(lost, nodes[1])
    victim.send_signal(signal.SIGINT if lost == "interrupt" else signal.SIGKILL)
    _, alive = psutil.wait_procs([*nodes, *processes], timeout=20)
    assert not alive
    if lost != "first":
        assert nodes[0].returncode == 1
        end = {
            "interrupt": r"was ended by Ctrl-C on its node \(--node-rank 1\)",
            "node": "cannot be reached any more",
            "worker": "was killed by signal 9",
        }[lost]
        assert re.search(rf"server beta \(process \d+\) .*{end}", (tmp_path / "node-0").read_text())
    assert nodes[2].returncode != 0 or lost != "first"


@pytest.mark.slow
def test_nodes_serve_and_end_together(tiny: Tiny, start: Start, tmp_path: pathlib.Path) -> None:
    """Nodes go on when an engine dies, and a signal to one node's launcher drains all nodes."""
    port = free_ports(3)
    nodes = [start(0, "--policy", "uniform", "--port", str(port)), start(1), start(2)]
    urls = [f"http://127.0.0.1:{port + rank}" for rank in range(3)]
    said(tmp_path, 0, "curl ")
    expected = tiny.lines[0]["text"]
    assert [completion(url) for url in urls] == [expected] * 3
    engine = only_child(only_child(nodes[1]))
    engine.kill()
    said(tmp_path, 0, f"beta: its engine (process {engine.pid}) was killed by signal 9")
    said(tmp_path, 0, "all engines are running again")
    assert [completion(url) for url in urls] == [expected] * 3
    # The machine of a node is lost, and the node is started again there.
    kill_all([*nodes[1].children(recursive=True), nodes[1]])
    said(tmp_path, 0, "beta: (process None) is lost: its node (--node-rank 1) is not connected")
    nodes[1] = start(1)
    running = "all engines are running again"
    assert eventually(lambda: (tmp_path / "node-0").read_text().count(running) == 2, 60)
    assert [completion(url) for url in urls] == [expected] * 3
    processes = [child for node in nodes for child in node.children(recursive=True)]
    nodes[2].send_signal(signal.SIGTERM)
    assert [node.wait(30) for node in nodes] == [0, 0, 0], (tmp_path / "node-0").read_text()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
