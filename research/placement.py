"""What every placement policy costs, on routing traces.

    python research/placement.py                # a synthetic trace, made here
    python research/placement.py --traces DIR   # measured ones: gpt_oss_20b_mmlu_pro.npz and,
                                                  # where there, olmoe_mixtral_counts.json
    python research/placement.py --traces DIR --quick   # a fast look
    python research/placement.py --traces DIR --sections memory,churn --output OUT
    python research/placement.py --traces DIR --check   # exit code 1 if a target is missed

What is measured, and what the columns mean, is said in research/policies.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

# Run as a script, only this folder would be searched.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Placements are solved on the CPU.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from rich.console import Console

from benchmarks.arguments import add_check, add_folder, check_folder, list_of, some_of
from benchmarks.command import say, verdict
from benchmarks.targets import Target
from dance_jax.bench.arguments import count_or_0
from dance_jax.bench.terminal import exit_code, terminal
from dance_jax.placement.policies import POLICIES
from research.policies import churn, figures, plots, setups, speed, tables, traces
from research.policies.setups import Setup
from research.policies.targets import Results, targets

SECTIONS = ("reference", "counts", "memory", "servers", "survive", "churn", "speed")
QUICK = ("reference", "counts")
#: Columns of the terminal, where it does not say.
WIDTH = 140


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python research/placement.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--traces", type=pathlib.Path, metavar="DIR", help="directory of measured traces"
    )
    add_folder(parser)
    add_check(parser)
    which = parser.add_mutually_exclusive_group()
    sections = ", ".join(SECTIONS)
    which.add_argument(
        "--sections", type=some_of(SECTIONS), default=SECTIONS, metavar="A,B", help=sections
    )
    which.add_argument(
        "--quick",
        dest="sections",
        action="store_const",
        const=QUICK,
        help=f"only {' and '.join(QUICK)}",
    )
    parser.add_argument(
        "--survive",
        type=list_of(count_or_0),
        default=setups.LOSSES,
        metavar="N,N",
        help="losses of servers to survive, in the section survive "
        f"({','.join(map(str, setups.LOSSES))})",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code."""
    options, console = parser().parse_args(arguments), terminal(WIDTH)
    return exit_code(lambda: verdict(console, run(options, console), options.check))


def run(options: argparse.Namespace, console: Console) -> list[Target]:
    """Measures the sections, printed as they come; writes the results."""
    if options.traces is None:
        trace, models = traces.synthetic_trace(), []
    else:
        trace, models = traces.read_trace(options.traces), traces.read_counts(options.traces)
    check_folder(options)
    console.print(f"{os.cpu_count()} cores, jax {jax.__version__}, {jax.default_backend()}")
    results = Results()
    for section in options.sections:
        measure(section, trace, models, results, console, options.survive)
    found = targets(results)
    if options.output is not None:
        write(options.output, results, found)
    return found


def measure(
    section: str,
    trace: traces.Trace,
    models: list[traces.CountsAlone],
    results: Results,
    console: Console,
    survive: Sequence[int] = setups.LOSSES,
) -> None:
    """One section: adds to the results and prints them."""
    if section == "churn":
        results.churn = churn.measure_churn(setups.reference(trace), POLICIES, say)
        tables.print_churn(console, results.churn)
    elif section == "survive":
        found = setups.surviving(trace, survive)
        results.survive = [figures.measure(setup, POLICIES, say) for setup in found]
        tables.print_price(console, results.survive)
    elif section == "speed":
        results.speed = speed.measure_speed(speed.cases(POLICIES), say)
        tables.print_speed(console, results.speed)
    else:
        results.tables[section] = []
        for setup in setups_of(section, trace, models):
            table = figures.measure(setup, POLICIES, say)
            results.tables[section].append(table)
            tables.print_table(console, table)
            alone = setup.test is None
            line = tables.gain_line(table) if alone else tables.fastest_line(table)
            console.print(f"{line}\n", markup=False)
    if section == "counts":
        console.print(tables.counts_note())
        if not models:
            console.print(f"OLMoE and Mixtral are left out: no {traces.OLMOE_MIXTRAL} is given.")


def setups_of(
    section: str, trace: traces.Trace, models: list[traces.CountsAlone]
) -> Iterable[Setup]:
    """What a section of tables is about."""
    if section == "reference":
        return [setups.reference(trace)]
    if section == "counts":
        return setups.counts_alone(trace, models)
    return setups.memories(trace) if section == "memory" else setups.more_servers(trace)


def write(directory: pathlib.Path, results: Results, found: list[Target]) -> None:
    """result.json, and the plots of the sections that were measured."""
    plain: dict[str, Any] = {
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "sections": {
            section: [_plain(table) for table in measured]
            for section, measured in results.tables.items()
        },
        "survive": [_plain(table) for table in results.survive],
        "churn": [dataclasses.asdict(row) for row in results.churn],
        "speed": [dataclasses.asdict(row) for row in results.speed],
        "targets": [dataclasses.asdict(target) | {"missed": target.missed} for target in found],
    }
    (directory / "result.json").write_text(json.dumps(plain, indent=1) + "\n")
    for table in results.tables.get("reference", []):
        plots.draw_figures(table, directory / "figures.png")
        plots.draw_holders(table.setup, table.placements, directory / "holders.png")
    if swept := results.tables.get("memory"):
        plots.draw_memory(swept, directory / "memory.png")


def _plain(table: figures.Table) -> dict[str, Any]:
    setup = table.setup
    return {
        "title": setup.title,
        "shape": list(setup.counts.shape),
        "devices": list(setup.devices),
        "slots": setup.capacities,
        "memory": setup.memory,
        "survive": setup.survive,
        "rows": [dataclasses.asdict(row) for row in table.rows],
        "published": {policy: dict(each) for policy, each in setup.published.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
