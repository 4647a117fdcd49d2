"""The exchange of a MoE layer, measured on a testbed: `python benchmarks/exchange.py`.

What is measured, and how, is said in benchmarks/layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

# Run as a script, only this folder would be searched.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# This process computes placements and nothing else.
os.environ["JAX_PLATFORMS"] = "cpu"

from rich.console import Console

from benchmarks.arguments import add_check, add_folder, check_folder, count, list_of
from benchmarks.command import EXAMPLES, exit_code, terminal, verdict
from benchmarks.layers import measure, plots
from benchmarks.layers.measure import Cell, Grid, Variant
from benchmarks.layers.routes import Sizes
from benchmarks.layers.servers import ServerError, Servers, joined
from benchmarks.layers.targets import DECODE, HALVED, targets
from benchmarks.layers.texts import WIRE_DTYPES, read_texts
from benchmarks.namespaces import Testbed, hosts_like, parse_rate, show_rate
from benchmarks.namespaces.temporary import add_testbed, testbed
from benchmarks.targets import Target
from dance_jax.config import UserError
from dance_jax.launch.defaults import demo_dir
from dance_jax.models import model_config

#: Columns of the terminal, where it does not say.
WIDTH = 110
SOCKETS = "sockets"
TRANSPORTS = (SOCKETS, "collectives")
#: Delays of the links, each way, and the seconds in which idle bytes are counted.
DELAYS_S, IDLE_S = [0.0, 0.02, 0.04], 10.0
#: Where wire dtypes are compared: tokens of a device, none of which stays at home.
WIRE_TOKENS = 256
QUICK = {
    "rates": [20_000_000, None],
    "tokens": [1, 8, 64, 256],
    "local_shares": [0.0, 0.5, 1.0],
    "repeat": 5,
    "seconds": 1.0,
    "text_bytes": 4000,
}
FULL = {
    "rates": [20_000_000, 100_000_000, 500_000_000, None],
    "tokens": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
    "local_shares": [0.0, 0.25, 0.5, 0.75, 1.0],
    "repeat": 15,
    "seconds": 2.0,
    "text_bytes": 24000,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    demo = Demo()
    parser = argparse.ArgumentParser(
        prog="python benchmarks/exchange.py",
        description="The exchange of a MoE layer, measured on a testbed. Root, Linux.",
    )
    add = parser.add_argument
    add("--rates", type=list_of(parse_rate), help="of the links, e.g. 20Mbps,none")
    add("--tokens", type=list_of(count), help="per device, e.g. 1,8,256")
    add("--local-shares", type=list_of(_share), help="of tokens, from 0 to 1")
    add("--layers", type=count, default=demo.layers, help="MoE layers of a step (%(default)s)")
    add("--repeat", type=count, help="steps of a cell at most")
    add("--seconds", type=float, help="of a cell, about")
    add("--hidden", type=count, default=demo.hidden, help="(%(default)s, as of the demo model)")
    add("--width", type=count, default=demo.width, help="of an expert (%(default)s)")
    add("--experts", type=count, default=demo.experts, help="of a layer (%(default)s)")
    add("--top-k", type=count, default=demo.top_k, help="(%(default)s)")
    add("--wire-dtype", choices=WIRE_DTYPES, default="compute", help="of the grid (%(default)s)")
    add("--transport", choices=(*TRANSPORTS, "both"), default=SOCKETS)
    add("--tasks", type=pathlib.Path, help="directory of JSON Lines with texts (examples/tasks)")
    add("--text-bytes", type=count, help="of text, about")
    add_testbed(parser, "exchange")
    add_folder(parser)
    add("--quick", action="store_true", help="a small grid")
    add_check(parser)
    return parser


class Demo:
    """The demo model's sizes."""

    def __init__(self) -> None:
        config = model_config(json.loads((demo_dir() / "config.json").read_text()))
        self.hidden, self.width = config.hidden_size, config.expert.width
        self.experts, self.top_k = config.num_experts, config.top_k
        self.layers = len(config.moe_layers)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return share


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code."""
    options, console = parser().parse_args(arguments), terminal(WIDTH)
    for key, value in (QUICK if options.quick else FULL).items():
        if getattr(options, key) is None:
            setattr(options, key, value)

    def work() -> int:
        return verdict(console, run(options, console), options.check)

    return exit_code(work, ServerError)


def run(options: argparse.Namespace, console: Console) -> list[Target]:
    """Measures on a testbed that is removed whatever happens; writes the results."""
    hosts = hosts_like((EXAMPLES / "hosts.txt").read_text())
    directory = options.tasks or EXAMPLES / "tasks"
    pattern = "*.jsonl" if options.tasks else "*.heldout.jsonl"
    texts = read_texts(sorted(directory.glob(pattern)), options.text_bytes)
    devices = tuple(host.devices for host in hosts)
    values = (options.hidden, options.width, options.experts, options.top_k, options.layers)
    sizes = Sizes(*values, devices)
    check_folder(options)
    with (
        testbed(options.name, hosts, None, options.cores, console) as bed,
        tempfile.TemporaryDirectory(prefix="dance-jax-exchange-") as work,
    ):
        result = measure_all(options, bed, sizes, texts, pathlib.Path(work))
    console.print()
    found = targets(result)
    if options.output is not None:
        write(options.output, result, found)
    return found


def measure_all(
    options: argparse.Namespace,
    bed: Testbed,
    sizes: Sizes,
    texts: list[str],
    work: pathlib.Path,
) -> dict[str, Any]:
    """All measurements, printed as they come."""
    result: dict[str, Any] = {
        "sizes": dataclasses.asdict(sizes),
        "cores": {name: host.share for name, host in bed.hosts.items()},
        "wire_dtype": options.wire_dtype,
    }
    with joined(bed, work) as servers:
        result["transport"] = transport = transports(options, servers)[0]
        result["idle_bytes_per_s"] = measure.idle_bytes(bed, IDLE_S)
        print(f"idle: {result['idle_bytes_per_s']:.0f} bytes per second of a host, one way")
        room = max(*options.tokens, WIRE_TOKENS)
        grid = Grid(servers, sizes, room, options.repeat, options.seconds)
        print(HEAD_LINE)
        result["cells"] = [_shown(grid.cell(*where)) for where in cells(options)]
        wire = (Variant(WIRE_TOKENS, transport, each) for each in WIRE_DTYPES)
        result["wire"] = [_shown(grid.cell(variant, 0.0, HALVED[0])) for variant in wire]
        bed.set_rate(None)
        result["texts"] = measure.score_texts(servers, texts)
    print_texts(result["texts"])
    result["latency"] = []
    if transport == SOCKETS:
        with joined(bed, work, delayed=True) as servers:
            result["latency"] = latency(options, servers, sizes)
    bed.set_rate(min(filter(None, options.rates), default=None))
    result["prompts"] = measure.run_prompts(bed, work / "prompts.log", options.wire_dtype)
    print_prompts(result["prompts"])
    return result


def transports(options: argparse.Namespace, servers: Servers) -> tuple[str, ...]:
    """Those that are measured; the first is judged.

    Raises:
        UserError: the servers have no sockets.
    """
    wanted = TRANSPORTS if options.transport == "both" else (options.transport,)
    if SOCKETS in wanted and servers.transport != SOCKETS:
        raise UserError("sockets need the C++ library: install a compiler, or ask for collectives")
    return wanted


def cells(options: argparse.Namespace) -> Iterator[tuple[Variant, float, int | None]]:
    """The grid, in an order in which little is compiled."""
    for transport in TRANSPORTS if options.transport == "both" else (options.transport,):
        for tokens in options.tokens:
            variant = Variant(tokens, transport, options.wire_dtype)
            for rate in options.rates:
                for share in options.local_shares:
                    yield variant, share, rate


def latency(options: argparse.Namespace, servers: Servers, sizes: Sizes) -> list[dict[str, Any]]:
    tokens = [count for count in options.tokens if count <= DECODE]
    tokens = sorted({min(tokens), max(tokens)}) if tokens else []
    found = measure.latency(servers, sizes, tokens, DELAYS_S, options.repeat)
    for each in found:
        layers = ", ".join(f"{layer * 1e3:.1f}" for layer in each["layers_s"])
        delays = ", ".join(f"{delay * 1e3:.0f}" for delay in each["delays_s"])
        print(
            f"{each['tokens']} tokens, links {delays} ms late: {layers} ms per layer, "
            f"{each['rounds']:.2f} delays"
        )
    return found


HEAD_LINE = (
    f"{'tokens':>6} {'transport':<11} {'wire':<8} {'link':<10} {'local':>5} {'transfers':>9} "
    f"{'ms/layer':>8}  {'waiting':>7} {'moving':>7} {'collect':>7} {'experts':>7} {'packing':>7}  "
    f"{'bytes':>9} {'/ bound':>7} {'rounds':>6}"
)


def _shown(cell: Cell) -> Cell:
    """Prints a line of the table: bytes are of the worst server and direction in a layer."""
    parts = " ".join(f"{cell.critical_parts_s[part] * 1e3:>7.2f}" for part in plots.PARTS)
    ratio = "-" if cell.ratio is None else f"{cell.ratio:.3f}"
    print(
        f"{cell.tokens:>6} {cell.transport:<11} {cell.wire_dtype:<8} {show_rate(cell.rate):<10} "
        f"{cell.local_share:>5g} {cell.transfers_per_token:>9g} {cell.layer_s * 1e3:>8.2f}  "
        f"{parts}  {cell.worst_bytes:>9.0f} {ratio:>7} {cell.rounds:>6g}",
        flush=True,
    )
    return cell


def print_texts(texts: dict[str, Any]) -> None:
    print(f"\nthe demo model on {texts['texts']} texts, {texts['bytes']:,} bytes")
    print(
        f"{'wire':<9} {'bits/byte':>9} {'|change of logit|, largest':>27} {'mean':>9} "
        f"{'same token':>11}"
    )
    for wire_dtype in WIRE_DTYPES:
        each = texts[wire_dtype]
        print(
            f"{wire_dtype:<9} {each['bits_per_byte']:>9.5f} {each['largest_logit_change']:>27.4f} "
            f"{each['mean_logit_change']:>9.5f} {each['same_token']:>11.2%}"
        )


def print_prompts(run: dict[str, Any]) -> None:
    print(
        f"\n{run['prompts']} example prompts, {run['tokens']:,} tokens in {run['seconds']:.1f} s, "
        f"local share {run['local_share']:.3f}: from ready to the last answer the hosts sent "
        f"{run['sent_bytes']:,} bytes, {run['ratio']:.3f} x the bound of {run['bound']:,} (payload "
        f"{run['payload_bytes']:,}); {run['start_bytes']:,} before"
    )


def write(directory: pathlib.Path, result: dict[str, Any], found: list[Target]) -> None:
    """result.json, and the plots of the grid."""
    cells: list[Cell] = [c for c in result["cells"] if c.transport == result["transport"]]
    verdict = [dataclasses.asdict(target) | {"missed": target.missed} for target in found]
    plain = result | {"targets": verdict}
    for key in ("cells", "wire"):
        plain[key] = [dataclasses.asdict(c) | {"ratio": c.ratio} for c in result[key]]
    (directory / "result.json").write_text(json.dumps(plain, indent=1) + "\n")
    if cells:
        plots.draw(cells, directory)


if __name__ == "__main__":
    sys.exit(main())
