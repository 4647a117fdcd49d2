"""A model of real size on three servers of this machine, none of which holds it.

    python benchmarks/real_size.py
    python benchmarks/real_size.py --peer llama.cpp=/path/to/build/bin

Qwen3-30B-A3B's shape with 24 of its 48 layers and random weights: experts in four bits, the trunk
in eight. Three servers with unequal memory are started by `python -m dance_jax.launch`; together
they have room for --coverage times all experts. Reported are the seconds until they answer, the
tokens per second of one stream and of one on each server at once, and the proportional share of
memory (Pss) of each server, as the system counts it. With --peer the same shape runs in one process
of llama.cpp. Takes 15 GB of memory and about 20 GB in --work, where the weights stay.
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

# Run as a script, only this folder would be searched.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import psutil

from benchmarks.arguments import count, positive
from benchmarks.command import exit_code, say
from benchmarks.programs import Work
from benchmarks.programs.child import memory
from benchmarks.programs.llama_cpp import LlamaCpp, directory
from benchmarks.programs.models import Model
from benchmarks.serving.cluster import Cluster, ClusterError, started
from benchmarks.serving.http import Address
from dance_jax.config import UserError
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.launch.worker.cores import available
from dance_jax.models.checkpoint import Checkpoint

#: Servers, and their shares of the room for experts.
SHARES = {"alpha": 0.5, "beta": 0.3, "gamma": 0.2}
#: Seconds until the servers must answer.
READY_LIMIT_S = 300.0
SERVED = "real-size"


@dataclasses.dataclass
class Found:
    """What was measured of the servers."""

    ready_s: float
    #: Tokens per second of one stream, by the server it was sent to.
    alone: dict[str, float] = dataclasses.field(default_factory=dict)
    #: Tokens per second of all servers, a stream on each.
    together: float = 0.0
    #: Bytes (Pss) of each server's processes, and of the launcher.
    memory: dict[str, int] = dataclasses.field(default_factory=dict)


def hosts(checkpoint: Checkpoint, coverage: float) -> str:
    """A hosts file whose servers have room for `coverage` times all experts.

    Raises:
        UserError: a server alone would hold them all.
    """
    experts = len(checkpoint.config.moe_layers) * checkpoint.config.num_experts
    each = checkpoint.expert_bytes("float32")
    lines = []
    for name, share in SHARES.items():
        slots = math.ceil(coverage * share * experts)
        if slots >= experts:
            raise UserError(f"--coverage {coverage:g}: server {name} alone would hold the model")
        lines.append(f"{name} address=localhost devices=1 memory={slots * each}B")
    return "\n".join(lines) + "\n"


def complete(address: Address, prompt: list[int], tokens: int) -> float:
    """Seconds of a request for so many tokens."""
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
        said = json.load(answer)
    if said["usage"]["completion_tokens"] != tokens:
        raise RuntimeError(f"{address}: {tokens} tokens were asked for: {said['usage']}")
    return time.perf_counter() - began


def decode_speed(address: Address, prompt: list[int], tokens: int) -> float:
    """Tokens per second of one stream after its first token."""
    first = complete(address, prompt, 1)
    return tokens / (complete(address, [*prompt[1:], prompt[0]], tokens + 1) - first)


def server_memory(launcher: int) -> dict[str, int]:
    """Bytes (Pss) of each server with all its processes, in the order they were started."""
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
def serving(path: pathlib.Path, coverage: float, cache: pathlib.Path) -> Iterator[Cluster]:
    """The three servers, which end with the block."""
    text = hosts(Checkpoint.open(path), coverage)
    say(text)
    with tempfile.TemporaryDirectory(prefix="dance-jax-real-size-") as work:
        file = pathlib.Path(work) / "hosts.txt"
        file.write_text(text)
        arguments = ["--hosts", str(file), "--model", str(path), "--cache-dir", str(cache)]
        arguments += ["--served-model-name", SERVED, "--max-model-len", "512"]
        arguments += ["--max-num-seqs", "4", "--rebalance-interval", "0"]
        with started(parse_hosts(text), arguments) as cluster:
            yield cluster


def measure(path: pathlib.Path, options: argparse.Namespace, prompt: list[int]) -> Found:
    """Starts the servers, asks them and looks at their memory."""
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
    """The same shape in one process of llama.cpp, in Q4_0."""
    with contextlib.closing(peer.open(model, "int4")) as side:
        return {
            "version": peer.version(),
            "tokens_per_s": side.speed(Work("decode", 1, tokens)),
            "first_token_s": side.first_token(cold=True),
        }


def show(result: dict[str, Any]) -> None:
    """Prints what was measured."""
    ours = result["dance_jax"]
    verdict = "reached" if ours["ready_s"] <= READY_LIMIT_S else "MISSED"
    print(f"three servers ready after {ours['ready_s']:.0f} s ({READY_LIMIT_S:.0f} s: {verdict})")
    for name, speed in ours["alone"].items():
        print(f"  {name}: {ours['memory'][name] / 1e9:.2f} GB, one stream {speed:.2f} tokens/s")
    print(f"  a stream on each: {ours['together']:.2f} tokens/s in all")
    print(f"  memory of all: {sum(ours['memory'].values()) / 1e9:.2f} GB")
    if peer := result.get("peer"):
        print(
            f"{peer['version']}, one process: {peer['tokens_per_s']:.2f} tokens/s, first token "
            f"after {peer['first_token_s']:.1f} s"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description="A model of real size on three servers of this machine."
    )
    add = parser.add_argument
    add("--layers", type=count, default=24, help="of the model (%(default)s)")
    add("--experts", default="int4", help="format of their weights (%(default)s)")
    add("--trunk", default="int8", help="format of its weights (%(default)s)")
    add("--coverage", type=positive, default=1.05, help="room over all experts (%(default)s)")
    add("--tokens", type=count, default=32, help="decoded by a stream (%(default)s)")
    add("--peer", type=directory, metavar="llama.cpp=DIR", help="measure its programs as well")
    add("--json", type=pathlib.Path, metavar="FILE", help="also write the figures here")
    add(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path.home() / ".cache" / "dance_jax" / "benchmarks",
        help="where weights are made and kept (%(default)s)",
    )
    options = parser.parse_args()

    def work() -> int:
        model = Model("qwen3-24-layers", "", options.work, options.layers)
        say("making the weights")
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

    return exit_code(work, RuntimeError, ClusterError)


if __name__ == "__main__":
    sys.exit(main())
