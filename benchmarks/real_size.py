"""Serve a model of real size on three servers of this machine, none of which holds all of it.

    python benchmarks/real_size.py
    python benchmarks/real_size.py --peer llama.cpp=/path/to/build/bin

The model has the shape of Qwen3-30B-A3B with 24 of its 48 layers and random weights: experts in
four bits, the trunk in eight. `python -m dance_jax.launch` starts three servers with unequal
memory, which together have room for --coverage times all experts. The report has the seconds until
the servers are ready, the tokens per second of one stream and of three streams at once (one on each
server), and the memory of each server as the kernel's proportional set size (Pss). With --peer, the
same shape also runs in one llama.cpp process. Needs 15 GB of memory, and about 20 GB of disk in
--work, where the weights are kept.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

# A script's import path has only its own folder; add the repository root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import psutil

from benchmarks.command import ROOT, say
from benchmarks.programs import Work
from benchmarks.programs.child import memory
from benchmarks.programs.llama_cpp import LlamaCpp, directory
from benchmarks.programs.models import Model
from dance_jax.bench.arguments import count, positive
from dance_jax.bench.cluster import RunError, StartedCluster, started
from dance_jax.bench.http import Address
from dance_jax.bench.terminal import exit_code
from dance_jax.config import UserError
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.launch.worker.cores import available
from dance_jax.models.checkpoint import Checkpoint

#: Each server's share of the room for experts.
SHARES = {"alpha": 0.5, "beta": 0.3, "gamma": 0.2}
#: Seconds within which the servers must be ready.
READY_LIMIT_S = 300.0
SERVED = "real-size"


@dataclasses.dataclass
class Found:
    """Measurements of the three servers."""

    ready_s: float
    #: Tokens per second of one stream, by the server that the stream was sent to.
    alone: dict[str, float] = dataclasses.field(default_factory=dict)
    #: Total tokens per second with one stream on each server.
    together: float = 0.0
    #: Bytes (Pss) of each server's processes and of the launcher, by name.
    memory: dict[str, int] = dataclasses.field(default_factory=dict)


def hosts(checkpoint: Checkpoint, coverage: float) -> str:
    """Return the text of a hosts file whose servers have room for `coverage` times all experts.

    Raises:
        UserError: one server alone would hold all experts.
    """
    experts = len(checkpoint.config.moe_layers) * checkpoint.config.num_experts
    each = checkpoint.expert_bytes("float32")
    lines = []
    for name, share in SHARES.items():
        slots = math.ceil(coverage * share * experts)
        if slots >= experts:
            raise UserError(
                f"--coverage {coverage:g}: server {name} alone would hold the model; choose less"
            )
        lines.append(f"{name} address=localhost devices=1 memory={slots * each}B")
    return "\n".join(lines) + "\n"


def complete(address: Address, prompt: list[int], tokens: int) -> float:
    """Request `tokens` tokens and return the seconds until the answer is complete."""
    body = {
        "model": SERVED,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"http://{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        reply = json.load(answer)
    if reply["usage"]["completion_tokens"] != tokens:
        raise RuntimeError(f"{address}: asked for {tokens} tokens, got usage {reply['usage']}")
    return time.perf_counter() - began


def decode_speed(address: Address, prompt: list[int], tokens: int) -> float:
    """Return the tokens per second of one stream after its first token."""
    first = complete(address, prompt, 1)
    return tokens / (complete(address, [*prompt[1:], prompt[0]], tokens + 1) - first)


def server_memory(launcher: int) -> dict[str, int]:
    """Return the bytes (Pss) of the launcher and of each server with all its processes.

    Servers are told apart by the order in which the launcher started them.
    """
    process = psutil.Process(launcher)
    found = {"launcher": memory(launcher)["Pss"]}
    children = sorted(process.children(), key=lambda child: (child.create_time(), child.pid))
    totals = [
        sum(memory(each.pid)["Pss"] for each in [child, *child.children(recursive=True)])
        for child in children
    ]
    names = [*SHARES, *(f"process {number}" for number in range(len(SHARES), len(totals)))]
    return found | dict(zip(names, totals, strict=False))


@contextlib.contextmanager
def serving(path: pathlib.Path, coverage: float, cache: pathlib.Path) -> Iterator[StartedCluster]:
    """Run the three servers for the duration of the block."""
    text = hosts(Checkpoint.open(path), coverage)
    say(text)
    with tempfile.TemporaryDirectory(prefix="dance-jax-real-size-") as work:
        file = pathlib.Path(work) / "hosts.txt"
        file.write_text(text)
        arguments = ["--hosts", str(file), "--model", str(path), "--cache-dir", str(cache)]
        arguments += ["--served-model-name", SERVED, "--max-model-len", "512"]
        arguments += ["--max-num-seqs", "4", "--rebalance-interval", "0"]
        with started(parse_hosts(text), arguments, root=ROOT) as cluster:
            yield cluster


def measure(path: pathlib.Path, options: argparse.Namespace, prompt: list[int]) -> Found:
    """Start the servers, measure their speed and their memory."""
    began = time.monotonic()
    with serving(path, options.coverage, options.work) as cluster:
        asyncio.run(cluster.ready())
        found = Found(time.monotonic() - began)
        say(f"ready after {found.ready_s:.0f} s")
        for name, address in zip(SHARES, cluster.addresses, strict=True):
            found.alone[name] = decode_speed(address, prompt, options.tokens)
        with concurrent.futures.ThreadPoolExecutor(len(SHARES)) as pool:
            speeds = pool.map(
                lambda address: decode_speed(address, prompt, options.tokens), cluster.addresses
            )
            found.together = sum(speeds)
        found.memory = server_memory(cluster.pid)
    return found


def measure_peer(peer: LlamaCpp, model: Model, tokens: int) -> dict[str, Any]:
    """Measure the same shape in one llama.cpp process, in Q4_0."""
    with contextlib.closing(peer.open(model, "int4")) as side:
        return {
            "version": peer.version(),
            "tokens_per_s": side.speed(Work("decode", 1, tokens)),
            "first_token_s": side.first_token(cold=True),
        }


def show(result: dict[str, Any]) -> None:
    """Print the measurements."""
    ours = result["dance_jax"]
    verdict = "reached" if ours["ready_s"] <= READY_LIMIT_S else "MISSED"
    print(
        f"three servers ready after {ours['ready_s']:.0f} s "
        f"(at most {READY_LIMIT_S:.0f} s: {verdict})"
    )
    for name, speed in ours["alone"].items():
        print(f"  {name}: {ours['memory'][name] / 1e9:.2f} GB, one stream {speed:.2f} tokens/s")
    print(f"  one stream on each server: {ours['together']:.2f} tokens/s in total")
    print(f"  total memory: {sum(ours['memory'].values()) / 1e9:.2f} GB")
    if peer := result.get("peer"):
        print(
            f"{peer['version']}, one process: {peer['tokens_per_s']:.2f} tokens/s, first token "
            f"after {peer['first_token_s']:.1f} s"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Serves a model of real size on three servers of this machine."
    )
    add = parser.add_argument
    add("--layers", type=count, default=24, help="layers of the model (%(default)s)")
    add("--experts", default="int4", help="weight format of the experts (%(default)s)")
    add("--trunk", default="int8", help="weight format of the trunk (%(default)s)")
    add(
        "--coverage",
        type=positive,
        default=1.05,
        help="room for experts on all servers, as a multiple of all experts (%(default)s)",
    )
    add("--tokens", type=count, default=32, help="tokens decoded by a stream (%(default)s)")
    add(
        "--peer",
        type=directory,
        metavar="llama.cpp=DIR",
        help="also measure llama.cpp; DIR holds its programs",
    )
    add("--json", type=pathlib.Path, metavar="FILE", help="also write the figures here")
    add(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path.home() / ".cache" / "dance_jax" / "benchmarks",
        help="directory where the weights are generated and kept (%(default)s)",
    )
    options = parser.parse_args()

    def work() -> int:
        model = Model("qwen3-24-layers", "", options.work, options.layers)
        say("generating the weights")
        path = model.converted(options.experts, options.trunk)
        prompt = Work("decode", 1, options.tokens).prompts(model.vocabulary)[0]
        result = {"dance_jax": dataclasses.asdict(measure(path, options, prompt))}
        if options.peer is not None:
            peer = LlamaCpp(options.peer, len(available()) or 1)
            result["peer"] = measure_peer(peer, model, options.tokens)
        show(result)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n")
        return 0

    return exit_code(work, RuntimeError, RunError)


if __name__ == "__main__":
    sys.exit(main())
