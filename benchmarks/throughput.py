"""Tokens per second of one process, beside transformers with the same weights.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --transformers-python /path/to/venv/bin/python  # compare
    python benchmarks/throughput.py --family qwen3_next

A random model of about 200 M parameters in float32, by default a DeepSeek-V2: 8 layers (the first
dense), hidden 512, 64 experts x 256, top-6, 2 shared; families.py has the others. Every step goes
through `Engine.step`: scheduler, transfers and sampling are part of it. Transformers runs in a
process of its own, with as many threads, its forward pass alone (no `generate`), and in each case
its fastest experts implementation; the two take turns. A figure is the median step of a round, the
best of all rounds. Decode follows a prompt of 32 tokens; its share of the memory's speed is the
weights and cache it must read, over the bandwidth of a plain read of 1 GiB, measured here as well.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import gzip
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

# Run as a script, only this folder would be searched.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from benchmarks.families import SHAPES
from benchmarks.trace import self_times
from dance_jax.config import EngineConfig
from dance_jax.engine.engine import Engine
from dance_jax.engine.sequence import Request, SamplingParams
from dance_jax.models import native
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import ensure_converted
from dance_jax.models.random_weights import write_random_checkpoint
from dance_jax.models.tokenizer import Tokenizer

CONFIG = EngineConfig(
    max_model_len=512,
    max_num_seqs=8,
    decode_rows=(1, 8),
    slice_rows=(4, 32),
    route_sample=0,
)
#: Token ids of the shapes.
VOCABULARY = 8192
#: Prompt tokens before decode is timed, and prompt tokens of a prefill.
PROMPT, CHUNK = 32, 128
#: Steps whose time is attributed to parts of the model.
TRACED_STEPS = 8
#: Scopes of the step (jax.named_scope) in the words of the table.
PARTS = {
    "experts": "routed experts",
    "layer": "attention, shared experts, router",
    "logits": "output projection",
    "sampling": "sampling",
    "write": "cache write",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    kind: str
    rows: int
    #: Wanted ratio to transformers.
    target: float

    @property
    def name(self) -> str:
        if self.kind == "decode":
            return f"decode, batch {self.rows}"
        return f"prefill, {self.rows} x {CHUNK}" if self.rows > 1 else f"prefill, {CHUNK}"

    @property
    def tokens(self) -> int:
        """Tokens computed in a step."""
        return self.rows * (1 if self.kind == "decode" else CHUNK)

    def implementations(self) -> tuple[str, ...]:
        """Experts implementations of transformers that can be the fastest here."""
        # In prefill batched_mm copies the weights of every assignment: 10 GB for 8 x 128.
        return ("grouped_mm", "batched_mm", "eager")[:: 1 if self.kind == "decode" else 2]


CASES = (
    Case("decode", 1, 3.0),
    Case("decode", 8, 2.5),
    Case("prefill", 1, 1.0),
    Case("prefill", 8, 0.9),
)


@dataclasses.dataclass
class Figure:
    """One side of one case: seconds of a step, the best median so far, and the tokens."""

    seconds: float = float("inf")
    tokens: list[list[int]] = dataclasses.field(default_factory=list)
    implementation: str = ""

    def take(self, seconds: list[float], tokens: list[list[int]], implementation: str = "") -> None:
        median = statistics.median(seconds)
        if median < self.seconds:
            self.seconds, self.implementation = median, implementation
        self.tokens = tokens


class Ours:
    """This project's engine, all experts on one device."""

    def __init__(self, path: pathlib.Path):
        self.engine = Engine(Checkpoint.open(path), Tokenizer.load(path), None, 0, None, CONFIG)
        self._number = 0
        began = time.perf_counter()
        self.engine.warmup()
        self.compile_seconds = time.perf_counter() - began

    def _add(self, prompts: list[list[int]], max_tokens: int) -> dict[str, list[int]]:
        # Of a full batch some prompts may have begun later than others, and go on.
        while self.engine.has_work:
            self.engine.step()
        produced = {}
        for prompt in prompts:
            name, self._number = str(self._number), self._number + 1
            produced[name] = []
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            self.engine.add(Request(name, None, prompt, params))
        return produced

    def _step(self, produced: dict[str, list[int]]) -> float:
        began = time.perf_counter()
        result = self.engine.step()
        seconds = time.perf_counter() - began
        for delta in result.outputs:
            produced[delta.request_id] += delta.token_ids
        return seconds

    def measure(
        self, kind: str, prompts: list[list[int]], steps: int
    ) -> tuple[list[float], list[list[int]]]:
        """Seconds of each step, and the greedy tokens of each row."""
        if kind == "prefill":
            seconds, produced = [], {}
            for step in reversed(range(steps)):
                # Another beginning each time, or the prefix cache would have it; the last is real.
                changed = [[(prompt[0] + step) % 1000 + 2, *prompt[1:]] for prompt in prompts]
                produced = self._add(prompts if step == 0 else changed, 1)
                seconds.append(self._step(produced))
            return seconds, list(produced.values())
        produced = self._add(prompts, steps + 1)
        while any(not tokens for tokens in produced.values()):  # the prompts
            self._step(produced)
        seconds = [self._step(produced) for _ in range(steps)]
        return seconds, list(produced.values())

    def bytes_read(self, rows: int) -> float:
        """Bytes of weights and cache that a decode step of so many rows reads, on average."""
        runner = self.engine.runner
        model = runner.model_config
        before = runner.counts()
        distinct, steps = 0, 16
        produced = self._add(prompts(rows, PROMPT, seed=rows), steps + 1)
        self._step(produced)
        before = runner.counts()
        for _ in range(steps):
            self._step(produced)
            after = runner.counts()
            distinct += int((after > before).sum())
            before = after
        expert = runner.form.bytes
        trunk = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.state))
        width = np.dtype(CONFIG.dtype).itemsize
        embedding = model.vocab_size * model.hidden_size * width
        trunk -= 0 if model.tie_embeddings else embedding
        cache = rows * (PROMPT + steps // 2) * model.cache_width * width
        return trunk + distinct / steps * expert + cache

    def parts(self, rows: int) -> dict[str, float]:
        """Share of a decode step's device time by scope, from a trace of a few steps."""
        parts = self.engine.runner.compile((rows, 0))
        scopes = dict(
            scope
            for part in (parts.begin, *parts.layers, parts.logits, parts.choose)
            for scope in _scopes(part.as_text())
        )
        produced = self._add(prompts(rows, PROMPT, seed=0), TRACED_STEPS + 2)
        self._step(produced)
        self._step(produced)
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                for _ in range(TRACED_STEPS):
                    self._step(produced)
            (path,) = pathlib.Path(directory).rglob("*.trace.json.gz")
            events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        for event in events:
            named = event.get("args", {})
            if "hlo_op" in named:
                named["hlo_op"] = f"{named['hlo_module']}/{named['hlo_op']}"
        times = self_times(events, scopes)
        total = sum(times.values())
        return {part: times[part] / total for part in sorted(times, key=lambda p: -times[p])}


def _scopes(hlo: str) -> Iterator[tuple[str, str]]:
    """Module and instruction -> the scope of PARTS it was traced in."""
    module = re.match(r"HloModule ([^\s,]+)", hlo)
    assert module is not None
    pattern = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)
    for name, path in pattern.findall(hlo):
        for part in reversed(path.split("/")):
            if part in PARTS:
                yield f"{module[1]}/{name}", part
                break


class Theirs:
    """transformers in a process of its own."""

    def __init__(self, python: str, path: pathlib.Path):
        script = pathlib.Path(__file__).with_name("transformers_side.py")
        self._process = subprocess.Popen(
            [python, str(script), str(path), str(threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions: str = self._read()["versions"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"transformers ended with exit code {self._process.wait()}")
        return json.loads(line)

    def measure(
        self, kind: str, prompts: list[list[int]], steps: int, implementation: str
    ) -> tuple[list[float], list[list[int]]]:
        request = {"kind": kind, "tokens": prompts, "steps": steps}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request | {"implementation": implementation}) + "\n")
        self._process.stdin.flush()
        reply = self._read()
        return reply["seconds"], reply["tokens"]

    def close(self) -> None:
        self._process.communicate()


def threads() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prompts(rows: int, length: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(2, VOCABULARY, (rows, length)).tolist()


def read_bandwidth() -> float:
    """Bytes per second of reading 1 GiB with all threads, the best of several."""
    values = np.ones(1 << 27, np.int64)
    pieces = np.array_split(values, threads())
    best = float("inf")
    with concurrent.futures.ThreadPoolExecutor(len(pieces)) as pool:
        for _ in range(6):
            began = time.perf_counter()
            list(pool.map(np.max, pieces))
            best = min(best, time.perf_counter() - began)
    return values.nbytes / best


def host_seconds(ours: Ours, rows: int) -> float:
    """Seconds of a decode step outside `Runner.run`: scheduler, detokenizer, counts."""
    runner = ours.engine.runner
    run = runner.run
    inside: list[float] = []

    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        result = run(*arguments, **named)
        inside.append(time.perf_counter() - began)
        return result

    runner.run = timed
    try:
        seconds, _ = ours.measure("decode", prompts(rows, PROMPT, seed=0), 16)
    finally:
        runner.run = run
    return statistics.median(
        whole - step for whole, step in zip(seconds, inside[-len(seconds) :], strict=True)
    )


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> tuple[int, int]:
    """Equal greedy tokens before each row's first difference, and tokens compared."""
    equal = total = 0
    for mine, other in zip(ours, theirs, strict=True):
        length = min(len(mine), len(other))
        same = [a == b for a, b in zip(mine, other, strict=False)]
        equal += same.index(False) if False in same else length
        total += length
    return equal, total


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    work = arguments.work
    source = work / f"throughput-{arguments.family}"
    if not (source / "complete").exists():
        write_random_checkpoint(source, SHAPES[arguments.family])
        (source / "complete").touch()
    native.load(work)
    bandwidth = read_bandwidth()
    ours = Ours(ensure_converted(source, work / "models", lambda *_: None))
    python = arguments.transformers_python
    theirs = Theirs(python, source) if python else None
    result: dict[str, Any] = {
        "family": arguments.family,
        "threads": threads(),
        "bandwidth_gb_s": bandwidth / 1e9,
        "compile_s": ours.compile_seconds,
        "transformers": theirs.versions if theirs else None,
        "cases": [],
    }
    mine = [Figure() for _ in CASES]
    other = [Figure() for _ in CASES]
    for turn in range(arguments.rounds):
        for index, case in enumerate(CASES):
            decode = case.kind == "decode"
            tokens = prompts(case.rows, PROMPT if decode else CHUNK, seed=index)
            steps = arguments.steps if decode else 3
            mine[index].take(*ours.measure(case.kind, tokens, steps))
            if theirs is None:
                continue
            chosen = case.implementations() if turn == 0 else (other[index].implementation,)
            for name in chosen:
                few = steps if turn else min(steps, 6)
                found = theirs.measure(case.kind, tokens, few, name)
                other[index].take(*found, name)
    if theirs:
        theirs.close()
    for index, case in enumerate(CASES):
        entry: dict[str, Any] = {
            "case": case.name,
            "tokens_per_s": case.tokens / mine[index].seconds,
            "step_ms": mine[index].seconds * 1e3,
            "target_ratio": case.target,
        }
        if theirs:
            entry["transformers_tokens_per_s"] = case.tokens / other[index].seconds
            entry["implementation"] = other[index].implementation
            entry["ratio"] = other[index].seconds / mine[index].seconds
            entry["equal_tokens"] = agreement(mine[index].tokens, other[index].tokens)
        if case.kind == "decode":
            read = ours.bytes_read(case.rows)
            entry["bytes_read_mb"] = read / 1e6
            entry["bandwidth_share"] = read / mine[index].seconds / bandwidth
            host = host_seconds(ours, case.rows)
            entry["host_ms"] = host * 1e3
            device = mine[index].seconds - host
            entry["parts_ms"] = {
                PARTS.get(part, part): share * device * 1e3
                for part, share in ours.parts(case.rows).items()
            }
        result["cases"].append(entry)
    return result


def show(result: dict[str, Any]) -> None:
    compared = result["transformers"]
    print(
        f"{result['family']}, {result['threads']} threads, "
        f"memory read at {result['bandwidth_gb_s']:.1f} GB/s"
        + (f", {compared}" if compared else "")
        + f"; compiled in {result['compile_s']:.1f} s\n"
    )
    head = f"{'tokens per second':<20} {'dance_jax':>10}"
    if compared:
        head += f" {'transformers':>13}  {'experts':<11} {'ratio':>6} {'wanted':>7}  equal tokens"
    print(head)
    for case in result["cases"]:
        line = f"{case['case']:<20} {case['tokens_per_s']:>10.1f}"
        if compared:
            equal, total = case["equal_tokens"]
            line += f" {case['transformers_tokens_per_s']:>13.1f}  {case['implementation']:<11}"
            line += f" {case['ratio']:>5.2f}x {case['target_ratio']:>6.1f}x  {equal} of {total}"
        print(line)
    print("\nWhere a decode step goes, ms")
    for case in result["cases"]:
        if "parts_ms" not in case:
            continue
        print(
            f"{case['case']}: {case['step_ms']:.2f} in all; reads {case['bytes_read_mb']:.0f} MB, "
            f"{case['bandwidth_share']:.0%} of the memory's speed"
        )
        for part, milliseconds in case["parts_ms"].items():
            print(f"  {part:<36}{milliseconds:>7.2f}")
        print(f"  {'host':<36}{case['host_ms']:>7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens per second, beside transformers.")
    parser.add_argument("--transformers-python", help="a Python that has torch and transformers")
    parser.add_argument(
        "--family", choices=sorted(SHAPES), default="deepseek_v2", help="shape of the model"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=32, help="decode steps of a round")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    parser.add_argument(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path.home() / ".cache" / "dance_jax" / "benchmarks",
        help="where the random models (1.6 GB each) are made and kept",
    )
    arguments = parser.parse_args()
    result = run(arguments)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
