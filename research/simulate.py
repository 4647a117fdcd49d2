"""Simulates requests on clusters: the paper's servers, and its sweep to 256 devices.

    python research/simulate.py                          # routes and arrivals made here
    python research/simulate.py --sections parts         # half a minute
    python research/simulate.py --traces DIR --output OUT
    python research/simulate.py --sections sweep --devices 4,16 --mbps 100,1000

--traces: a directory with gpt_oss_20b_mmlu_pro.npz, azure_code.csv and azure_conv.csv.
research/simulation and research/simulator say what is simulated and what is assumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterable

# A script only finds modules of its own folder.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Placements are solved on the CPU.
os.environ["JAX_PLATFORMS"] = "cpu"

from rich.console import Console

import research.simulation
import research.simulator
from benchmarks.arguments import add_folder, check_folder, some_of
from benchmarks.command import say
from dance_jax.bench.arguments import add_seed, count
from dance_jax.bench.terminal import exit_code, terminal
from dance_jax.config import UserError
from dance_jax.placement.policies import POLICIES
from research.simulation import clusters, plots, runs, tables
from research.simulation.runs import Run, Sweep

SECTIONS = ("parts", "recorded", "sweep")
#: Columns of a terminal of unknown width.
WIDTH = 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python research/simulate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, swept = parser.add_argument, Sweep()
    policies = some_of(tuple(POLICIES), "policy")
    add("--traces", type=pathlib.Path, metavar="DIR", help="directory of measured traces")
    add_folder(parser)
    add(
        "--sections",
        type=some_of(SECTIONS),
        metavar="A,B",
        help=f"{', '.join(SECTIONS)} (default: all; recorded only with --traces)",
    )
    add(
        "--policies",
        type=policies,
        default=tuple(POLICIES),
        metavar="A,B",
        help="policies of parts and recorded (default: all)",
    )
    add(
        "--sweep-policies",
        type=policies,
        default=swept.policies,
        metavar="A,B",
        help=f"policies of the sweep ({','.join(swept.policies)})",
    )
    sizes = ",".join(map(str, swept.devices))
    use = f"devices of the sweep's clusters ({sizes})"
    add("--devices", type=_devices, default=swept.devices, metavar="N,M", help=use)
    add(
        "--mbps",
        dest="bandwidths",
        type=_rates,
        default=swept.bandwidths,
        metavar="X,Y",
        help="rates of the sweep's links (100,300,1000)",
    )
    add(
        "--intervals",
        type=_positive,
        default=swept.intervals_s,
        metavar="X,Y",
        help="mean seconds between two requests of a server, in the sweep (8,10,15)",
    )
    add(
        "--requests",
        type=count,
        default=swept.requests,
        help="requests of each run of the sweep, at least (%(default)s)",
    )
    add(
        "--lock-step",
        action="store_true",
        help=f"sweep lock step too, up to {clusters.MOST_DEVICES} devices",
    )
    jobs = "processes that simulate clusters of the sweep, one cluster each at a time (%(default)s)"
    add("--jobs", type=count, default=os.cpu_count() or 1, metavar="N", help=jobs)
    add_seed(parser, "of tasks, requests and policies")
    return parser


def _positive(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: numbers with commas between them are needed"
        ) from error
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: numbers above 0 are needed")
    return tuple(sorted(set(numbers)))


def _rates(text: str) -> tuple[float, ...]:
    return tuple(number * 1e6 for number in _positive(text))


def _devices(text: str) -> tuple[int, ...]:
    numbers = _positive(text)
    for number in numbers:
        try:
            if number != int(number):
                raise UserError(f"{number:g} devices: whole numbers are needed")
            clusters.devices_of(int(number))
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return tuple(int(number) for number in numbers)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code."""
    options = parser().parse_args(arguments)

    def work() -> int:
        run(options, terminal(WIDTH))
        return 0

    return exit_code(work)


def run(options: argparse.Namespace, console: Console) -> None:
    """Simulates the sections, prints each when it is done, and writes the results."""
    sections = _sections(options)
    check_folder(options)
    console.print(assumptions(), markup=False)
    found: list[Run] = []
    for section in sections:
        began = time.perf_counter()
        measured = list(_runs(section, options))
        found += measured
        _print(console, section, measured)
        console.print(f"{len(measured)} runs in {time.perf_counter() - began:.0f} s\n")
        if options.output is not None:
            write(options.output, found)
            draw(options.output, section, measured)


def assumptions() -> str:
    """The simplifications and assumptions of the simulation."""
    texts = (research.simulator.__doc__, research.simulation.__doc__)
    return "\n".join(text.strip() for text in texts if text) + "\n"


def _sections(options: argparse.Namespace) -> tuple[str, ...]:
    if options.sections is None:
        return SECTIONS if options.traces else tuple(s for s in SECTIONS if s != "recorded")
    if "recorded" in options.sections and options.traces is None:
        raise UserError("--sections recorded: --traces DIR is needed")
    return options.sections


def _runs(section: str, options: argparse.Namespace) -> Iterable[Run]:
    if section == "parts":
        return runs.parts(options.policies, options.seed, say)
    if section == "recorded":
        return runs.recorded(options.traces, options.policies, options.seed, say)
    what = Sweep(
        devices=options.devices,
        bandwidths=options.bandwidths,
        intervals_s=options.intervals,
        policies=options.sweep_policies,
        requests=options.requests,
        lock_step=options.lock_step,
    )
    return runs.sweep(what, options.seed, say, options.jobs)


def _print(console: Console, section: str, measured: list[Run]) -> None:
    if section == "sweep":
        tables.print_sweep(console, measured)
        return
    for workload in dict.fromkeys(run.workload for run in measured):
        own = [run for run in measured if run.workload == workload]
        tables.print_ways(console, f"{section}, {workload}", own)


def write(directory: pathlib.Path, found: list[Run]) -> None:
    """Writes result.json."""
    plain = {"assumptions": assumptions(), "runs": [dataclasses.asdict(run) for run in found]}
    (directory / "result.json").write_text(json.dumps(plain, indent=1) + "\n")


def draw(directory: pathlib.Path, section: str, measured: list[Run]) -> None:
    """Draws the plots of a section."""
    if section == "sweep":
        plots.draw_sweep(measured, directory / "sweep.png")
        return
    for name in dict.fromkeys(run.workload for run in measured):
        own = [run for run in measured if run.workload == name]
        file = directory / f"{section}_{name.replace(' ', '_')}.png"
        plots.draw_ways(f"{section}, {name}", own, file)


if __name__ == "__main__":
    sys.exit(main())
