"""One cold start of a tiny cluster. All tests of launches use its results and compiled steps."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import os
import pathlib
import pickle
import shutil
import sys
from typing import Any

import pytest
from rich.console import Console

from dance_jax.config import EngineOptions
from dance_jax.engine.sequence import Request, SamplingParams
from dance_jax.launch.cli.answers import answer_line
from dance_jax.launch.cli.prompts import read_prompts
from dance_jax.launch.cli.report import print_summary
from dance_jax.launch.cli.run import RunResult, run_prompts
from dance_jax.launch.cli.stream import Stream
from dance_jax.launch.cluster.batch import Cluster
from dance_jax.launch.control import protocol
from dance_jax.launch.planning.defaults import engine_config
from dance_jax.launch.planning.hosts import read_hosts
from dance_jax.launch.planning.plan import make_plan
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import ensure_converted
from dance_jax.models.tokenizer import Tokenizer
from tests.launch.tiny import HOSTS, write_model
from tests.quick import cache_directory, shared_folder

#: Sequences at the same time on each device: few, so that few sizes are compiled.
NUM_SEQS = 4
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
    """Files of the tiny cluster and the results of its cold run."""

    folder: pathlib.Path
    fingerprint: str
    #: Hash of the model before conversion.
    source: str
    result: RunResult
    lines: list[dict[str, Any]]
    terminal: str
    cold: list[tuple[int, int]]
    #: Number of functions that every process compiles.
    functions: int
    #: Results of the same prompts, run again after a batch that was given up half-way.
    again: list[dict[str, Any]]

    def command(self, *options: str | os.PathLike[str]) -> list[str]:
        """The command for a launch of the same cluster with the same caches."""
        folder = self.folder
        words = ["--hosts", folder / "hosts.txt", "--model", folder / "model"]
        words += ["--cache-dir", folder / "cache", "--max-num-seqs", NUM_SEQS, *options]
        return [sys.executable, "-m", "dance_jax.launch", *map(str, words)]


_tiny: list[Tiny] = []


def cold_run(tmp_path_factory: pytest.TempPathFactory, expert_library: pathlib.Path | None) -> Tiny:
    """Results made once for all processes of the session, and files for this process alone."""
    if not _tiny:
        kept = shared_folder(tmp_path_factory) / "tiny.pickle"
        with kept.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                made = _cold_run(tmp_path_factory.mktemp("cold"), expert_library)
                kept.write_bytes(pickle.dumps(made))
        made = pickle.loads(kept.read_bytes())
        own = shutil.copytree(made.folder, tmp_path_factory.mktemp("tiny") / "copy")
        _tiny.append(dataclasses.replace(made, folder=own))
    return _tiny[0]


def _cold_run(folder: pathlib.Path, expert_library: pathlib.Path | None) -> Tiny:
    cache_dir = cache_directory(folder, expert_library)
    model = write_model(folder / "model")
    (folder / "hosts.txt").write_text(HOSTS)
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    path = ensure_converted(model, cache_dir / "models")
    checkpoint = Checkpoint.open(path)
    spec = read_hosts(folder / "hosts.txt")
    config = engine_config(
        checkpoint.config, EngineOptions(max_num_seqs=NUM_SEQS), formats=checkpoint.formats
    )
    plan = make_plan(spec, checkpoint, config, "uniform")
    prompts = read_prompts(folder / "prompts.jsonl", spec, max_tokens=8)
    console = Console(file=io.StringIO(), width=120, record=True)
    tokenizer = Tokenizer.load(path)
    cluster = Cluster(spec, checkpoint, plan.layout, config, cache_dir=cache_dir)
    with cluster:
        started = [reached[protocol.Ready] for reached in cluster._reached]
        with Stream(console, spec.names, prompts) as stream:
            result = run_prompts(cluster, plan, tokenizer, prompts, stream.update)
        give_up(cluster)
        again = run_prompts(cluster, plan, tokenizer, prompts)
    print_summary(console, result)
    # Per step size: the beginning, the layer without experts, the layers with experts (all alike)
    # and the logits. Then the choice of tokens, once per number of decoding rows.
    functions = 4 * len(config.buckets) + len({rows for rows, _ in config.buckets})
    if expert_library is None:
        functions += 2  # reading and writing a slot of the pool
    return Tiny(
        folder,
        checkpoint.fingerprint,
        checkpoint.source,
        result,
        lines(result),
        console.export_text(),
        [(ready.cache_hits, ready.cache_misses) for ready in started],
        functions,
        lines(again),
    )


def lines(result: RunResult) -> list[dict[str, Any]]:
    """The lines of --output."""
    names = result.plan.spec.names
    return [
        answer_line(names[prompt.rank], prompt, output)
        for prompt, output in zip(result.prompts, result.outputs, strict=True)
    ]


def give_up(cluster: Cluster) -> None:
    """Closes a long batch at its first delta."""
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    work = [(rank, Request(str(n), None, [5, 6], params)) for rank in range(3) for n in range(9)]
    deltas = cluster.generate(work)
    next(deltas)
    deltas.close()
    assert cluster.started
