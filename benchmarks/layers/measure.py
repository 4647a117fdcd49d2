"""The measurements: cells of the grid, the links' latency, a run of prompts, texts."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from benchmarks.namespaces import HEAD, Testbed
from benchmarks.namespaces.hosts import SUBNET
from dance_jax.cache import default_cache_dir
from dance_jax.config import UserError
from dance_jax.launch.defaults import demo_dir, engine_config
from dance_jax.launch.plan import make_plan
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import ensure_converted
from dance_jax.models.tokenizer import Tokenizer
from dance_jax.placement.activations import Activations

from .routes import Sizes, bound, deal, transfers_per_token, wire_bytes
from .servers import ROOT, Servers
from .step import Timed
from .texts import CONTEXT, Score

#: Steps of a cell: these at least, and as many more as fit into its seconds.
LEAST_STEPS = 3
WARM_STEPS, TRACED_STEPS = 2, 2
#: Texts that a device runs at once.
ROWS = 8


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is compiled."""

    tokens: int
    transport: str = "sockets"
    wire_dtype: str = "compute"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement; bytes and calls are of one layer, and of the worst server."""

    tokens: int
    transport: str
    wire_dtype: str
    local_share: float
    #: Bits per second; None: not shaped.
    rate: int | None
    steps: int
    #: Servers that a token visits in a layer.
    transfers_per_token: float
    #: Median step / layers, of the slowest server.
    layer_s: float
    #: Where a layer's time goes, by server, see `benchmarks.layers`.
    parts_s: list[dict[str, float]]
    #: On the interfaces, by server, of one layer: [received, sent] each.
    bytes: list[list[float]]
    #: Least bytes each way, by server.
    bound: list[float]
    #: Payload from a server to another in a layer, its message and its sums.
    message_bytes: float
    #: Calls of the transport in one layer: rounds in which every server waits for every other.
    rounds: float

    @property
    def ratio(self) -> float | None:
        """Bytes over the bound, of the worst server and direction; None where nothing must go."""
        pairs = [
            count / least
            for both, least in zip(self.bytes, self.bound, strict=True)
            for count in both
            if least
        ]
        return max(pairs, default=None)

    @property
    def critical_parts_s(self) -> dict[str, float]:
        """Of the server that waits least."""
        return min(self.parts_s, key=lambda parts: parts["waiting"])

    @property
    def worst_bytes(self) -> float:
        return max(count for both in self.bytes for count in both)

    @property
    def sent_bytes(self) -> float:
        """Of all servers."""
        return sum(sent for _, sent in self.bytes)


class Grid:
    """Cells, measured between servers that are joined."""

    def __init__(self, servers: Servers, sizes: Sizes, room: int, repeat: int, seconds: float):
        """
        Args:
            room: most tokens of a device in any cell.
            repeat: steps of a cell at most.
            seconds: that a cell may take, about.
        """
        self.servers, self.sizes, self.room = servers, sizes, room
        self.repeat, self.seconds = repeat, seconds
        self._variant: Variant | None = None

    def cell(self, variant: Variant, local_share: float, rate: int | None) -> Cell:
        """Measures one cell; only another variant is compiled anew."""
        ask, sizes, bed = self.servers.ask, self.sizes, self.servers.bed
        if variant != self._variant:
            where = {"transport": variant.transport, "wire": variant.wire_dtype}
            ask("compile", sizes=sizes, tokens=variant.tokens, room=self.room, **where)
            self._variant = variant
        ask("draw", local_share=local_share, seed=round(local_share * 1000))
        if bed.rates != dict.fromkeys(bed.hosts, rate):
            bed.set_rate(rate)
        warm = ask("run", steps=WARM_STEPS)
        fit = int(self.seconds / warm[0].seconds[-1])
        steps = min(max(fit, LEAST_STEPS), self.repeat)
        before = interfaces(bed)
        runs: list[Timed] = ask("run", steps=steps)
        counted = interfaces(bed) - before
        layers, rows = steps * sizes.layers, runs[0].rows
        calls = runs[0].links.dispatch.calls + runs[0].links.give_back.calls
        width = wire_bytes(variant.wire_dtype)
        sent = max(max(run.links.bytes_sent) for run in runs)
        return Cell(
            **dataclasses.asdict(variant),
            local_share=local_share,
            rate=rate,
            steps=steps,
            transfers_per_token=transfers_per_token(sizes, local_share),
            layer_s=max(statistics.median(run.seconds) for run in runs) / sizes.layers,
            parts_s=ask("trace", steps=TRACED_STEPS),
            bytes=(counted / layers).tolist(),
            bound=(bound(rows, sizes.hidden, width) / sizes.layers).tolist(),
            message_bytes=sent / layers,
            rounds=calls / layers,
        )


def interfaces(bed: Testbed) -> np.ndarray:
    """Bytes received and sent by the hosts' interfaces so far: int64 [hosts, 2]."""
    counters = bed.counters()
    return np.array([counters[host] for host in bed.hosts], np.int64)


def idle_bytes(bed: Testbed, seconds: float) -> float:
    """Bytes a second, sent and received, of the host that is busiest while nothing runs."""
    before = interfaces(bed)
    time.sleep(seconds)
    return float((interfaces(bed) - before).max() / seconds)


def latency(
    servers: Servers, sizes: Sizes, tokens: list[int], delays: list[float], repeat: int
) -> list[dict[str, Any]]:
    """Time of a decode layer whose tokens all leave, on links with a delay.

    Returns:
        Per number of tokens: delays_s and layers_s, and `rounds`: by how many delays a layer is
        slower when the delay grows (the slope).
    """
    found = []
    for count in tokens:
        where = {"transport": servers.transport, "wire": "compute"}
        servers.ask("compile", sizes=sizes, tokens=count, room=count, **where)
        servers.ask("draw", local_share=0.0, seed=0)
        layers = []
        for delay in delays:
            servers.ask("set_delay", seconds=delay)
            servers.ask("run", steps=WARM_STEPS)
            runs = servers.ask("run", steps=repeat)
            step = max(statistics.median(run.seconds) for run in runs)
            layers.append(step / sizes.layers)
        slope = float(np.polyfit(delays, layers, 1)[0])
        found.append({"tokens": count, "delays_s": delays, "layers_s": layers, "rounds": slope})
    return found


def run_prompts(bed: Testbed, log: pathlib.Path, wire_dtype: str) -> dict[str, Any]:
    """launch's run of the example prompts across the testbed.

    Returns:
        What prompts.py says, and: bytes that the hosts' interfaces sent (`sent_bytes`) and received
        from when all servers were ready to the last answer, sent before (`start_bytes`), and
        the bound of both.
    """
    examples = ROOT / "examples"
    files = [bed.write_hosts(measure=False), bed.ssh_config]
    data = [examples / "prompts.jsonl", examples / "activations.npz"]
    argv = [*map(str, files), f"{SUBNET}.1", *map(str, data), wire_dtype]
    start = interfaces(bed)
    with log.open("ab") as errors:
        process = bed.exec(
            HEAD,
            [sys.executable, "-m", "benchmarks.layers.prompts", *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            process.wait()
            raise UserError(f"the run of the prompts failed: {log.read_text()[-2000:]}")
        ready = interfaces(bed)
        process.stdin.write("\n")
        process.stdin.flush()
        report = json.loads(process.stdout.readline())
        counted = interfaces(bed) - ready
        process.communicate()
    finally:
        process.kill()
        process.wait()
    least = bound(np.array(report["transfers"]), report["hidden"], wire_bytes(wire_dtype))
    received, sent = counted.sum(0).tolist()
    return report | {
        "wire_dtype": wire_dtype,
        "sent_bytes": sent,
        "received_bytes": received,
        "start_bytes": int((ready - start)[:, 1].sum()),
        "bound": int(least.sum()),
        "ratio": max(sent, received) / float(least.sum()),
    }


def score_texts(servers: Servers, texts: list[str]) -> dict[str, Any]:
    """The demo model on texts, placed by the examples' activations, under every wire dtype."""
    path = ensure_converted(demo_dir(), default_cache_dir() / "models")
    checkpoint, tokenizer = Checkpoint.open(path), Tokenizer.load(path)
    encoded = [(text, tokenizer.encode(text)) for text in texts]
    kept = [(text, ids) for text, ids in encoded if 2 <= len(ids) <= CONTEXT]
    activations = Activations.load(ROOT / "examples" / "activations.npz")
    plan = make_plan(
        servers.spec, checkpoint, engine_config(checkpoint.config), "dance", activations
    )
    places = [devices * ROWS for devices in servers.spec.devices]
    waves = deal([ids for _, ids in kept], places)
    replies = servers.ask("score", model=path, layout=plan.layout, waves=waves, rows=ROWS)
    size = sum(len(text.encode()) for text, _ in kept)
    result: dict[str, Any] = {"texts": len(kept), "bytes": size}
    for wire_dtype in replies[0]:
        total = Score.total(reply[wire_dtype] for reply in replies)
        result[wire_dtype] = {
            "bits_per_byte": total.bits / size,
            "largest_logit_change": total.largest_change,
            "mean_logit_change": total.mean_change / total.predictions,
            "same_token": total.same_token / total.predictions,
            "predictions": total.predictions,
        }
    return result
