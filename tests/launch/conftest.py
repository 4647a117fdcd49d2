"""One cold start of a tiny cluster, whose results and compiled steps the other tests use."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from rich.console import Console

from dance_jax.launch.cluster import Cluster
from dance_jax.launch.defaults import engine_config
from dance_jax.launch.hosts import read_hosts
from dance_jax.launch.plan import make_plan
from dance_jax.launch.prompts import read_prompts
from dance_jax.launch.report import print_summary
from dance_jax.launch.run import RunResult, result_lines, run_prompts
from dance_jax.launch.stream import Stream
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import ensure_converted
from dance_jax.models.tokenizer import Tokenizer
from tests.launch.tiny import HOSTS, write_model


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


PROMPTS: list[dict[str, Any]] = [
    {"prompt": "Es war einmal", "max_tokens": 6},
    {"prompt": "x" * 400},
    {"prompt": "1 + 1 =", "server": "alpha", "max_tokens": 5},
    {"prompt": "\u00fcber alle Berge", "server": "gamma", "temperature": 0.8, "max_tokens": 4},
    {"prompt": "", "server": "beta"},
    {"prompt": "def f(x):", "server": "gamma", "max_tokens": 7},
]


@dataclasses.dataclass(frozen=True)
class Tiny:
    """Files of the tiny cluster and what its cold run gave."""

    folder: pathlib.Path
    fingerprint: str
    result: RunResult
    lines: list[dict[str, Any]]
    terminal: str
    cold: list[tuple[int, int]]

    def command(self, *options: str | os.PathLike[str]) -> list[str]:
        """A launch of the same cluster with the same caches."""
        folder = self.folder
        words = ["--hosts", folder / "hosts.txt", "--model", folder / "model"]
        words += ["--cache-dir", folder / "cache", *options]
        return [sys.executable, "-m", "dance_jax.launch", *map(str, words)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    model = write_model(folder / "model")
    (folder / "hosts.txt").write_text(HOSTS)
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    path = ensure_converted(model, folder / "cache" / "models")
    checkpoint = Checkpoint.open(path)
    spec = read_hosts(folder / "hosts.txt")
    config = engine_config(checkpoint.config)
    plan = make_plan(spec, checkpoint, config, "uniform")
    prompts = read_prompts(folder / "prompts.jsonl", spec, max_tokens=8)
    console = Console(file=io.StringIO(), width=120, record=True)
    cluster = Cluster(spec, checkpoint, plan.layout, config, cache_dir=folder / "cache")
    with cluster, Stream(console, spec.names, prompts) as stream:
        result = run_prompts(cluster, plan, Tokenizer.load(path), prompts, stream.update)
    print_summary(console, result)
    return Tiny(
        folder,
        checkpoint.fingerprint,
        result,
        result_lines(result),
        console.export_text(),
        cluster.cache_use,
    )


class Launch:
    """A launch in a process of its own, with its workers and its private directory."""

    def __init__(self, command: list[str], folder: pathlib.Path) -> None:
        self.private = folder / "tmp"
        self.private.mkdir()
        self.output = folder / "terminal"
        environment = os.environ | {"TMPDIR": str(self.private), "COLUMNS": "120"}
        with open(self.output, "wb") as output:
            self.process = psutil.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        self.workers: list[psutil.Process] = []

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str, seconds: float = 300) -> None:
        """Waits until the launch has printed something; notes its workers."""
        deadline = time.monotonic() + seconds
        while text not in self.text:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.05)
        self.workers = sorted(self.process.children(), key=lambda worker: worker.pid)

    def worker(self, rank: int) -> psutil.Process:
        """A server's process; they are started in the order of their ranks."""
        return self.workers[rank]

    def assert_nothing_left(self, seconds: float = 10) -> None:
        """No process, private file or port of the launch is left after so long."""
        _, alive = psutil.wait_procs(self.workers, timeout=seconds)
        assert not alive
        assert list(self.private.iterdir()) == []

    def kill(self) -> None:
        for process in [*self.workers, self.process]:
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def launch(tiny: Tiny, tmp_path: pathlib.Path) -> Iterator[Any]:
    """Starts launches of the tiny cluster: launch(option, ...) -> Launch."""
    launches: list[Launch] = []

    def start(*options: str | os.PathLike[str]) -> Launch:
        launches.append(Launch(tiny.command(*options), tmp_path))
        return launches[-1]

    yield start
    for one in launches:
        one.kill()
