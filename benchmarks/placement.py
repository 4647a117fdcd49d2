"""What every placement policy costs, on routing traces.

    python benchmarks/placement.py                # a synthetic trace, made here
    python benchmarks/placement.py --traces DIR   # measured ones: gpt_oss_20b_mmlu_pro.npz and,
                                                  # where there, olmoe_mixtral_counts.json
    python benchmarks/placement.py --traces DIR --quick   # a fast look
    python benchmarks/placement.py --traces DIR --sections memory,churn --output OUT
    python benchmarks/placement.py --traces DIR --check   # exit code 1 if a target is missed

What is measured, and what the columns mean, is said in benchmarks/policies.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

# Run as a script, only this folder would be searched.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Placements are solved on the CPU.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from rich.console import Console

from benchmarks.policies import churn, figures, plots, setups, speed, tables, traces
from benchmarks.policies.setups import Setup
from benchmarks.policies.targets import Results, targets
from benchmarks.targets import Target, chosen_sections
from dance_jax.config import UserError
from dance_jax.placement import POLICIES

MISSED, WRONG, INTERRUPTED = 1, 2, 130
SECTIONS = ("reference", "counts", "memory", "servers", "churn", "speed")
QUICK = ("reference", "counts")
#: Columns of the terminal, where it does not say.
WIDTH = 110


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/placement.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--traces", type=pathlib.Path, metavar="DIR", help="directory of measured traces")
    add("--output", type=pathlib.Path, metavar="DIR", help="for result.json and the plots")
    add("--check", action="store_true", help="exit code 1 if a target is missed")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--sections", type=_sections, default=SECTIONS, metavar="A,B", help=", ".join(SECTIONS)
    )
    which.add_argument(
        "--quick",
        dest="sections",
        action="store_const",
        const=QUICK,
        help=f"only {' and '.join(QUICK)}",
    )
    return parser


def _sections(text: str) -> tuple[str, ...]:
    return chosen_sections(text, SECTIONS)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code."""
    options = parser().parse_args(arguments)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    try:
        found = run(options, console)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        return INTERRUPTED
    console.print("Targets")
    for target in found:
        console.print(target.line(), markup=False, soft_wrap=True)
    return MISSED if options.check and any(target.missed for target in found) else 0


def run(options: argparse.Namespace, console: Console) -> list[Target]:
    """Measures the sections, printed as they come; writes the results."""
    if options.traces is None:
        trace, models = traces.synthetic_trace(), []
    else:
        trace, models = traces.read_trace(options.traces), traces.read_counts(options.traces)
    if options.output is not None:
        _check_output(options.output)
    console.print(f"{os.cpu_count()} cores, jax {jax.__version__}, {jax.default_backend()}")
    results = Results()
    for section in options.sections:
        measure(section, trace, models, results, console)
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
) -> None:
    """One section: adds to the results and prints them."""
    if section == "churn":
        results.churn = churn.measure_churn(setups.reference(trace), POLICIES, _say)
        tables.print_churn(console, results.churn)
    elif section == "speed":
        results.speed = speed.measure_speed(speed.cases(POLICIES), _say)
        tables.print_speed(console, results.speed)
    else:
        results.tables[section] = []
        for setup in setups_of(section, trace, models):
            table = figures.measure(setup, POLICIES, _say)
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check_output(directory: pathlib.Path) -> None:
    """Before minutes of measuring: matplotlib is there, and files can be made."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--output: the plots need matplotlib: pip install 'dance-jax[bench]'")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"--output: {directory} cannot be written to: {error.strerror}") from error


def write(directory: pathlib.Path, results: Results, found: list[Target]) -> None:
    """result.json, and the plots of the sections that were measured."""
    plain: dict[str, Any] = {
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "sections": {
            section: [_plain(table) for table in measured]
            for section, measured in results.tables.items()
        },
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
        "rows": [dataclasses.asdict(row) for row in table.rows],
        "published": {policy: dict(each) for policy, each in setup.published.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
