"""Child process that runs this project's engine: python -m ... CONVERTED KERNELS

Each line of standard input is a JSON request; a line of JSON on standard output answers it:
{"do": "measure", "kind": str, "prompts": [[int]], "tokens": int}
-> {"tokens_per_s": float, "processor_s_per_token": float, "tokens": [[int]]}
{"do": "profile", "rows": int} -> see `EngineSide.profile`.
"""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.programs import Work
from benchmarks.trace import self_times
from dance_jax.config import EngineConfig
from dance_jax.engine.engine import Engine
from dance_jax.engine.sequence import Request, SamplingParams
from dance_jax.memory import use_huge_pages
from dance_jax.models import native
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.tokenizer import Tokenizer

CONFIG = EngineConfig(
    max_model_len=1024,
    max_num_seqs=8,
    decode_rows=(1, 8),
    slice_rows=(4, 16, 32),
    route_sample=0,
)
#: Batches of prompts in a measurement of prefill, one after the other.
PREFILLS = 3
#: Decode steps of a profile, and decode steps that are traced.
STEPS, TRACED_STEPS = 16, 8
#: Table labels of the step's scopes (jax.named_scope).
PARTS = {
    "experts": "routed experts",
    "layer": "attention, shared experts, router",
    "logits": "output projection",
    "sampling": "sampling",
    "write": "cache write",
}


class EngineSide:
    """An engine with all experts on one device; every step goes through `Engine.step`."""

    def __init__(self, path: str) -> None:
        checkpoint = Checkpoint.open(path)
        self._formats = checkpoint.formats
        self.engine = Engine(checkpoint, Tokenizer.load(path), None, 0, None, CONFIG)
        self._number = self._beginning = 0
        self.engine.warmup()

    def measure(self, kind: str, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Measure speed (by the median step) and processor time; return the greedy tokens too."""
        measured = self._prefill(prompts) if kind == "prefill" else self._decode(prompts, tokens)
        seconds, processor, produced = measured
        step = len(prompts) * (tokens if kind == "prefill" else 1)
        return {
            "tokens_per_s": step / statistics.median(seconds),
            "processor_s_per_token": processor / step / len(seconds),
            "tokens": produced,
        }

    def _prefill(self, prompts: list[list[int]]) -> tuple[list[float], float, list[list[int]]]:
        """Return the seconds of each prefill, their total processor time, and the first tokens."""
        seconds, processor, produced = [], 0.0, {}
        for _ in range(PREFILLS):
            # A new first token each time, so that the prefix cache misses.
            self._beginning += 1
            changed = [[self._beginning % 1000 + 2, *prompt[1:]] for prompt in prompts]
            produced = self._add(changed, 1)
            began, used = time.perf_counter(), _processor()
            while not all(produced.values()):
                self._step(produced)
            seconds.append(time.perf_counter() - began)
            processor += _processor() - used
        return seconds, processor, list(produced.values())

    def _decode(
        self, prompts: list[list[int]], tokens: int
    ) -> tuple[list[float], float, list[list[int]]]:
        """Return the seconds of each step, their total processor time, and each prompt's tokens."""
        produced = self._prompted(prompts, tokens + 1)
        used = _processor()
        seconds = [self._step(produced) for _ in range(tokens)]
        processor = _processor() - used
        return seconds, processor, [row[: tokens + 1] for row in produced.values()]

    def profile(self, rows: int) -> dict[str, Any]:
        """Profile decode steps: bytes read, host time, and shares of the device's time.

        Returns:
            step_s: seconds of the median step; bytes: weights and cache that a step reads, on
            average; host_s: seconds outside `Runner.run`; parts: share of the device's time by
            the labels of PARTS.
        """
        prompts = Work("decode", rows, STEPS).prompts(self.engine.runner.model_config.vocab_size)
        steps, inside = self._timed(prompts)
        outside = [step - own for step, own in zip(steps, inside, strict=True)]
        return {
            "step_s": statistics.median(steps),
            "bytes": self._bytes_read(prompts),
            "host_s": statistics.median(outside),
            "parts": self._parts(prompts),
        }

    def _timed(self, prompts: list[list[int]]) -> tuple[list[float], list[float]]:
        """Return the seconds of each decode step, in total and within `Runner.run`."""
        runner = self.engine.runner
        run, inside = runner.run, []

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = run(*arguments, **named)
            inside.append(time.perf_counter() - began)
            return result

        runner.run = timed  # type: ignore[method-assign]
        try:
            steps, _, _ = self._decode(prompts, STEPS)
        finally:
            del runner.run
        return steps, inside[-len(steps) :]

    def _bytes_read(self, prompts: list[list[int]]) -> float:
        runner, rows = self.engine.runner, len(prompts)
        model, distinct = runner.model_config, 0
        produced = self._prompted(prompts, STEPS + 1)
        before = runner.counts()
        for _ in range(STEPS):
            self._step(produced)
            after = runner.counts()
            distinct += int((after > before).sum())
            before = after
        trunk = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.state))
        if not model.tie_embeddings:  # a token reads only one row of the embedding
            kept = self._formats.trunk["embedding"]
            trunk -= kept.bytes(model.hidden_size, model.vocab_size)
        width = np.dtype(CONFIG.dtype).itemsize
        cache = rows * (len(prompts[0]) + STEPS // 2) * model.cache_width * width
        return trunk + distinct / STEPS * runner.form.bytes + cache

    def _parts(self, prompts: list[list[int]]) -> dict[str, float]:
        """Return the share of a decode step's device time by scope, from a trace of a few steps."""
        parts = self.engine.runner.compile((len(prompts), 0))
        scopes = dict(
            scope
            for part in (parts.begin, *parts.layers, parts.logits, parts.choose)
            for scope in _scopes(part.as_text())
        )
        produced = self._prompted(prompts, TRACED_STEPS + 2)
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
        return {PARTS.get(part, part): time / total for part, time in times.most_common()}

    def _prompted(self, prompts: list[list[int]], max_tokens: int) -> dict[str, list[int]]:
        """Add requests and run until each has its first token; return the tokens so far."""
        produced = self._add(prompts, max_tokens)
        while not all(produced.values()):
            self._step(produced)
        return produced

    def _add(self, prompts: list[list[int]], max_tokens: int) -> dict[str, list[int]]:
        # Finish earlier requests first: in a full batch some may have started later than others.
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
        """Run a step, append its tokens to `produced`, and return its seconds."""
        began = time.perf_counter()
        result = self.engine.step()
        seconds = time.perf_counter() - began
        for delta in result.outputs:
            produced[delta.request_id] += delta.token_ids
        return seconds


def _processor() -> float:
    """Return the processor time of all threads of this process so far, in seconds."""
    times = os.times()
    return times.user + times.system


def _scopes(hlo: str) -> Iterator[tuple[str, str]]:
    """Yield each instruction as "module/instruction", with the scope of PARTS that it is in."""
    module = re.match(r"HloModule ([^\s,]+)", hlo)
    assert module is not None
    pattern = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)
    for name, path in pattern.findall(hlo):
        for part in reversed(path.split("/")):
            if part in PARTS:
                yield f"{module[1]}/{name}", part
                break


def main() -> None:
    use_huge_pages()
    path, kernels = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output that libraries print must not mix with the replies
    native.load(pathlib.Path(kernels))
    side = EngineSide(path)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        reply = getattr(side, request.pop("do"))(**request)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
