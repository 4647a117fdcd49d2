"""Measure speed, memory and start-up of one process, and of other programs on the same model.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --family qwen3_next --formats float32
    python benchmarks/throughput.py --peer transformers=/path/to/venv/bin/python
    python benchmarks/throughput.py --peer llama.cpp=/path/to/build/bin --shape olmoe

Models have random weights. The shape 200m has about 200 M parameters. By default it is a
DeepSeek-V2: 8 layers (the first dense), hidden size 512, 64 experts x 256, top-6, 2 shared experts;
families.py has the other families. Every program runs in its own processes with the same number of
threads. In each pair of measurements the programs take turns, dance_jax first. A figure is the
median over the pairs, a ratio the median of the pairs' ratios.

dance_jax is measured as `Engine.step`, which includes the scheduler, transfers and sampling; the
median step counts. Decode follows a prompt of 32 tokens. benchmarks/programs describes how the
other programs are measured: the forward pass of transformers with its fastest experts
implementation, and llama.cpp's own benchmarks and server. llama.cpp gets the same weights, rounded
to its format; for shapes whose float32 copy would be too large, each program has its own random
weights. The share of bandwidth is the speed at which a decode step reads the weights and the cache
that it must read, over the speed of a plain read of 1 GiB, which is measured here as well.

llama.cpp is the one in PyPI's source distribution of llama-cpp-python (vendor/llama.cpp), built
with cmake: targets llama-bench, llama-batched-bench and llama-server. The package gguf writes its
model files.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# A script's import path has only its own folder; add the repository root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.arguments import some_of
from benchmarks.command import say
from benchmarks.families import SHAPES
from benchmarks.programs import FORMATS, Peer, Side, Unsupported, Work
from benchmarks.programs.hugging_face import Transformers
from benchmarks.programs.llama_cpp import LlamaCpp, directory
from benchmarks.programs.models import Model
from benchmarks.programs.ours import Ours, OurSide
from dance_jax.bench.arguments import count
from dance_jax.bench.terminal import exit_code
from dance_jax.config import UserError
from dance_jax.launch.worker.cores import available, limited

DECODE = Work("decode", rows=1, tokens=64)
BATCH = Work("decode", rows=8, tokens=32)


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measurement; the table has one line of it for each format."""

    name: str
    unit: str
    #: Measures a side; returns the figure in `unit`.
    of: Callable[[Side], float]
    shape: str = "200m"
    formats: tuple[str, ...] = ("float32",)
    #: Target for the ratio of our figure to a peer's, by (peer, format): a minimum, or a maximum
    #: if less is better.
    wanted: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)

    @property
    def less(self) -> bool:
        """Whether less is better."""
        return self.unit != "tokens/s"


def _speed(work: Work) -> Callable[[Side], float]:
    return lambda side: side.speed(work)


def _wanted(transformers: float | None = None, **llama_cpp: float) -> dict[tuple[str, str], float]:
    """Return target ratios by (peer, format); those of llama.cpp are given by format."""
    wanted = {("llama.cpp", form): ratio for form, ratio in llama_cpp.items()}
    if transformers is not None:
        wanted["transformers", "float32"] = transformers
    return wanted


MEASURES = (
    Measure(
        "decode, batch 1",
        "tokens/s",
        _speed(DECODE),
        formats=FORMATS,
        wanted=_wanted(3.0, bf16=0.6, int8=0.5, int4=0.4),
    ),
    Measure(
        "decode, batch 8",
        "tokens/s",
        _speed(BATCH),
        formats=("float32", "int8"),
        wanted=_wanted(2.5, int8=0.9),
    ),
    Measure(
        "prefill, 128",
        "tokens/s",
        _speed(Work("prefill", 1, 128)),
        wanted=_wanted(1.0),
    ),
    Measure(
        "prefill, 8 x 128",
        "tokens/s",
        _speed(Work("prefill", 8, 128)),
        wanted=_wanted(0.9),
    ),
    Measure(
        "prefill, 512",
        "tokens/s",
        _speed(Work("prefill", 1, 512)),
        formats=("bf16", "int8"),
        wanted=_wanted(bf16=1.0, int8=0.7),
    ),
    Measure(
        "processor time of a decoded token",
        "ms",
        lambda side: side.processor_time(DECODE) * 1e3,
        formats=("float32", "int8"),
        wanted=_wanted(float32=1.2, int8=1.5),
    ),
    Measure("memory without weights and cache", "MB", lambda side: side.resident() / 1e6),
    Measure("first token, cold", "s", lambda side: side.first_token(cold=True)),
    Measure("first token, warm", "s", lambda side: side.first_token(cold=False)),
    Measure(
        "decode, batch 1",
        "tokens/s",
        _speed(DECODE),
        "olmoe",
        ("int8", "int4"),
        _wanted(int8=0.9, int4=0.8),
    ),
    Measure("first token, cold", "s", lambda side: side.first_token(cold=True), "48-layers"),
)


@dataclasses.dataclass
class Line:
    """A measured line of the table."""

    measure: Measure
    form: str
    #: By the side's name, the figure of each pair. Peers that do not support the measurement are
    #: absent.
    figures: dict[str, list[float]]

    def ratio(self, peer: str) -> float:
        """Return the median ratio of our figure to the peer's."""
        pairs = zip(self.figures[Ours.name], self.figures[peer], strict=True)
        return statistics.median(mine / other for mine, other in pairs)

    def entry(self) -> dict[str, Any]:
        """Return the line's entry in the file of results."""
        peers = [name for name in self.figures if name != Ours.name]
        return {
            "measure": self.measure.name,
            "format": self.form,
            "unit": self.measure.unit,
            "medians": {name: statistics.median(seen) for name, seen in self.figures.items()},
            "figures": self.figures,
            "ratios": {name: self.ratio(name) for name in peers},
            "wanted": {name: self.measure.wanted.get((name, self.form)) for name in peers},
        }


def measured(measure: Measure, form: str, sides: Mapping[str, Side], pairs: int) -> Line:
    """Measure all sides in turn, `pairs` times."""
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(pairs):
        for name in list(figures):
            try:
                figures[name].append(measure.of(sides[name]))
            except Unsupported:
                del figures[name]
        latest = ", ".join(f"{name} {seen[-1]:.4g}" for name, seen in figures.items())
        say(f"{form} {measure.name}, {turn + 1} of {pairs}: {latest} {measure.unit}")
    return Line(measure, form, figures)


def agreement(ours: Side, theirs: Side) -> tuple[int, int]:
    """Return the number of equal greedy tokens before the first difference, and of all tokens."""
    (mine,), (other,) = ours.greedy(DECODE), theirs.greedy(DECODE)
    same = [a == b for a, b in zip(mine, other, strict=True)]
    return same.index(False) if False in same else len(same), len(same)


def profile(ours: OurSide, rows: int, bandwidth: float) -> dict[str, Any]:
    """Return how the time of a decode step of `rows` rows is spent, in milliseconds.

    Args:
        ours: the side to profile.
        rows: sequences in the batch.
        bandwidth: of memory reads, in bytes per second.
    """
    found = ours.profile(rows)
    device = found["step_s"] - found["host_s"]
    return {
        "rows": rows,
        "step_ms": found["step_s"] * 1e3,
        "read_mb": found["bytes"] / 1e6,
        "bandwidth_share": found["bytes"] / found["step_s"] / bandwidth,
        "parts_ms": {part: share * device * 1e3 for part, share in found["parts"].items()}
        | {"host": found["host_s"] * 1e3},
    }


@contextlib.contextmanager
def opened(model: Model, form: str, peers: Sequence[Peer]) -> Iterator[dict[str, Side]]:
    """Open the sides that support the format, for the block; yield them by name."""
    with contextlib.ExitStack() as stack:
        yield {
            peer.name: stack.enter_context(contextlib.closing(peer.open(model, form)))
            for peer in peers
            if form in peer.formats
        }


def run(options: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Measure everything that the options ask for; return the results for the JSON file."""
    bandwidth = read_bandwidth(threads)
    peers = [Ours(), *(peer(threads) for peer in options.peer)]
    model = Model(options.shape, options.family, options.work)
    measures = [measure for measure in MEASURES if measure.shape == options.shape]
    result: dict[str, Any] = {"lines": [], "equal_tokens": {}, "decode": {}}
    for form in options.formats:
        own = [measure for measure in measures if form in measure.formats]
        if not own:
            continue
        with opened(model, form, peers) as sides:
            ours = sides[Ours.name]
            assert isinstance(ours, OurSide)
            for measure in own:
                line = measured(measure, form, sides, options.pairs)
                result["lines"].append(line.entry())
            if any(measure.unit == "tokens/s" for measure in own):
                rows = (1, 8) if options.shape == "200m" else (1,)
                result["decode"][form] = [profile(ours, each, bandwidth) for each in rows]
            if form == "float32":
                result["equal_tokens"] = {
                    name: agreement(ours, side) for name, side in sides.items() if side is not ours
                }
    if not result["lines"]:
        raise UserError(
            f"--shape {options.shape} has no measurement in --formats {','.join(options.formats)}: "
            "choose other formats"
        )
    return result | {
        "shape": options.family if options.shape == "200m" else options.shape,
        "machine": processor(),
        "threads": threads,
        "bandwidth_gb_s": bandwidth / 1e9,
        "pairs": options.pairs,
        "versions": [peer.version() for peer in peers[1:]],
    }


def read_bandwidth(threads: int) -> float:
    """Measure the bytes per second of reading 1 GiB with all threads, best of several tries."""
    values = np.ones(1 << 27, np.int64)
    pieces = np.array_split(values, threads)
    best = float("inf")
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(6):
            began = time.perf_counter()
            list(pool.map(np.max, pieces))
            best = min(best, time.perf_counter() - began)
    return values.nbytes / best


def processor() -> str:
    """Return the processor's name."""
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    versions = "".join(f", {version}" for version in result["versions"])
    print(
        f"{result['shape']}: {result['machine']}, {result['threads']} threads, memory read at "
        f"{result['bandwidth_gb_s']:.1f} GB/s{versions}; median of {result['pairs']} pairs\n"
    )
    less = {measure.name: measure.less for measure in MEASURES}
    print(f"{'':<38}{'format':<9}{'dance_jax':>10}  {'peer':<13}{'':>10} {'ratio':>7}  target")
    for line in result["lines"]:
        head = f"{line['measure'] + ', ' + line['unit']:<38}{line['format']:<9}"
        head += f"{line['medians'][Ours.name]:>10.4g}"
        if not line["ratios"]:
            print(head)
        for name, ratio in line["ratios"].items():
            limit = line["wanted"][name]
            bound = "at most" if less[line["measure"]] else "at least"
            wanted = "-" if limit is None else f"{bound} {limit:g}"
            figure = line["medians"][name]
            print(f"{head}  {name:<13}{figure:>10.4g} {ratio:>7.2f}  {wanted}")
    for name, (equal, total) in result["equal_tokens"].items():
        print(f"\nfloat32 greedy tokens equal to those of {name}: {equal} of {total}")
    for form, decodes in result["decode"].items():
        for decode in decodes:
            show_decode(form, decode)


def show_decode(form: str, decode: dict[str, Any]) -> None:
    """Print how the time of a decode step is spent."""
    print(
        f"\nDecode step, {form}, batch {decode['rows']}: {decode['step_ms']:.2f} ms; reads "
        f"{decode['read_mb']:.0f} MB at {decode['bandwidth_share']:.0%} of the memory bandwidth"
    )
    for part, milliseconds in decode["parts_ms"].items():
        print(f"  {part:<36}{milliseconds:>7.2f}")


def peer_option(text: str) -> Callable[[int], Peer]:
    """Parse NAME=PATH; return a function that makes the peer for a number of threads."""
    name, _, path = text.partition("=")
    if name == Transformers.name and path:
        return lambda threads: Transformers(path, threads)
    if name == LlamaCpp.name:
        programs = directory(text)
        return lambda threads: LlamaCpp(programs, threads)
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a peer: give transformers=PYTHON or llama.cpp=DIR"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measures speed, memory and start-up of one process, and of other programs on "
        "the same model."
    )
    add = parser.add_argument
    add(
        "--peer",
        type=peer_option,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="compare with transformers=PYTHON (an interpreter that has torch and transformers) or "
        "llama.cpp=DIR (DIR holds its programs); may be repeated",
    )
    shapes = ("200m", "olmoe", "48-layers")
    add("--shape", choices=shapes, default="200m", help="shape of the model (%(default)s)")
    add(
        "--family",
        choices=sorted(SHAPES),
        default="deepseek_v2",
        help="model family of the shape 200m (%(default)s)",
    )
    formats = some_of(FORMATS, "format")
    add("--formats", type=formats, default=FORMATS, help=f"some of {','.join(FORMATS)} (all)")
    add("--pairs", type=count, default=5, help="pairs of measurements (%(default)s)")
    add("--threads", type=count, help="threads of each program (one per available core)")
    add("--json", type=pathlib.Path, metavar="FILE", help="also write the figures here")
    add(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path.home() / ".cache" / "dance_jax" / "benchmarks",
        help="directory where the models are generated and kept: 4 GB for 200m, 20 GB for olmoe "
        "(%(default)s)",
    )
    options = parser.parse_args()

    def work() -> int:
        cores = available() or [0]
        threads = options.threads or len(cores)
        if threads > len(cores):
            raise UserError(f"--threads {threads}: only {len(cores)} cores are available")
        with limited(cores[:threads]):
            result = run(options, threads)
        show(result)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n")
        return 0

    return exit_code(work, RuntimeError)


if __name__ == "__main__":
    sys.exit(main())
