"""Compare this version with an older one and with llama.cpp over RPC, on a testbed. Needs root.

    python benchmarks/peers.py --peer llama.cpp=DIR --old DIR --output OUT.json
    python benchmarks/peers.py --peer llama.cpp=DIR --links 100Mbps --loads "1 user" --repeats 1

benchmarks/systems/__init__.py describes what is measured and how.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import tempfile

# A script's import path has only its own folder; add the repository root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Only the servers compute; this process needs no accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"

from rich.console import Console

from benchmarks.arguments import add_check, list_of, policy_name, some_of
from benchmarks.command import ROOT, say, verdict
from benchmarks.live.places import count_activations
from benchmarks.namespaces import Testbed, hosts_like, parse_rate, show_rate
from benchmarks.namespaces.temporary import add_bed, add_testbed, again_on, testbed
from benchmarks.programs.llama_cpp import directory
from benchmarks.programs.models import Model
from benchmarks.systems import results
from benchmarks.systems.loads import LOADS, WARM, ask, fit_prompts, measure
from benchmarks.systems.results import Cell
from benchmarks.systems.running import FORMATS, SLOTS, Dance, Running, Star, System, about
from benchmarks.targets import plain_targets
from dance_jax.bench.arguments import add_seed, count
from dance_jax.bench.cluster import RunError
from dance_jax.bench.http import HttpError
from dance_jax.bench.report import write_json
from dance_jax.bench.terminal import exit_code, terminal
from dance_jax.config import UserError
from dance_jax.launch.cli.prompts import check_writable

#: Default policies of this version: the default of dance_jax.launch, and the paper's.
OURS = ("latency", "dance")
DEVICES = {"alpha": 1, "beta": 1, "gamma": 2}
#: Port of the first system's servers; each further system takes the next port.
FIRST_PORT = 8100
#: Tokens per answer in the run that placements are fitted to.
FIT_TOKENS = 32
WIDTH = 150


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/peers.py",
        description="Compares this version with an older one and with llama.cpp over RPC, on a "
        "testbed. Needs root on Linux.",
    )
    add = parser.add_argument
    add(
        "--peer",
        type=directory,
        metavar="llama.cpp=DIR",
        help="also measure llama.cpp over RPC (the star); DIR holds its programs",
    )
    add(
        "--old",
        type=pathlib.Path,
        metavar="DIR",
        help="also measure this other checkout of the project",
    )
    add(
        "--policies",
        type=list_of(policy_name),
        default=OURS,
        metavar="A,B",
        help=f"placement policies of this version ({','.join(OURS)})",
    )
    add(
        "--links",
        type=list_of(parse_rate),
        default=[20_000_000, 100_000_000, 500_000_000],
        metavar="RATES",
        help="link rates, measured one after another (20Mbps,100Mbps,500Mbps)",
    )
    names = tuple(load.name for load in LOADS)
    add(
        "--loads",
        type=some_of(names, "load"),
        default=names,
        metavar="A,B",
        help=f"some of: {', '.join(names)} (all)",
    )
    add(
        "--formats",
        type=some_of(FORMATS, "format"),
        default=FORMATS,
        help=f"some of: {', '.join(FORMATS)} (all)",
    )
    add("--repeats", type=count, default=5, help="repetitions of each load (%(default)s)")
    add_seed(parser, "seed of the prompts")
    add(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path.home() / ".cache" / "dance_jax" / "benchmarks",
        help="directory where the model is generated and kept; takes 4 GB (%(default)s)",
    )
    add_testbed(parser, "peers")
    add_bed(parser)
    add_check(parser)
    add("--output", type=pathlib.Path, metavar="JSON", help="write results here")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    options, console = parser().parse_args(words), terminal(WIDTH)

    def work() -> int:
        if options.bed is None:
            check(options)
            lines = (f"{name} devices={n} experts={SLOTS}" for name, n in DEVICES.items())
            hosts = hosts_like("\n".join(lines))
            with testbed(
                options.name, hosts, options.links[0], options.cores, console, options.round_trip
            ) as bed:
                return again_on(bed, __file__, words)
        cells = Comparison(options, Testbed.load(options.bed), console).run()
        results.show(console, cells)
        return verdict(console, list(results.targets(cells)), options.check)

    return exit_code(work, RunError, HttpError)


def check(options: argparse.Namespace) -> None:
    """Check the options before a testbed is made.

    Raises:
        UserError: --old is not a checkout, or the result cannot be written.
    """
    if options.old is not None and not (options.old / "dance_jax" / "launch").is_dir():
        raise UserError(
            f"--old {options.old}: not a checkout of this project (it has no dance_jax/launch)"
        )
    if options.output is not None:
        check_writable(options.output, "--output")


class Comparison:
    """Measures all cells of the comparison, one after another.

    Args:
        options: of the command line.
        bed: the testbed on which the systems run.
        console: for the tables.
    """

    def __init__(self, options: argparse.Namespace, bed: Testbed, console: Console) -> None:
        self._options, self._bed, self._console = options, bed, console
        self._model = Model("200m", "deepseek_v2", options.work.absolute())
        self._cells: list[Cell] = []

    def run(self) -> list[Cell]:
        """Measure all cells; write the results so far after each rate."""
        with tempfile.TemporaryDirectory(prefix="dance-jax-peers-") as folder:
            systems = self._systems(self._activations(pathlib.Path(folder)))
            for form in self._options.formats:
                own = [system for system in systems if form in system.formats]
                for rate in self._options.links:
                    self._bed.set_rate(rate)
                    with contextlib.ExitStack() as stack:
                        running = {}
                        for system in own:
                            say(f"{form}, {show_rate(rate)}: starting {system.name}")
                            running[system.name] = stack.enter_context(
                                system.serving(self._bed, self._model, form)
                            )
                        self._measure(form, rate, running)
                    self._write()
        return self._cells

    def _write(self) -> None:
        if self._options.output is not None:
            found = results.plain(self._cells) | plain_targets(results.targets(self._cells))
            write_json(self._options.output, vars(self._options), found)

    def _activations(self, folder: pathlib.Path) -> pathlib.Path:
        """Count expert activations on other requests of the same users; return their file."""
        say("counting which experts the users' requests activate")
        hosts, prompts, result = folder / "hosts.txt", folder / "fit.jsonl", folder / "fit.npz"
        lines = (f"{name} address=localhost experts={SLOTS * n}" for name, n in DEVICES.items())
        hosts.write_text("\n".join(lines) + "\n")
        fit_prompts(prompts, tuple(DEVICES), self._model.vocabulary)
        about_model = about(self._model, "float32")
        count_activations(hosts, prompts, result, FIT_TOKENS, about_model)
        return result

    def _systems(self, activations: pathlib.Path) -> list[System]:
        """Return the systems that the options ask for."""
        options = self._options
        found: list[System] = [
            Dance(policy, policy, activations, ROOT, FIRST_PORT + number)
            for number, policy in enumerate(options.policies)
        ]
        if options.old is not None:
            root, port = options.old.absolute(), FIRST_PORT + len(found)
            found.append(Dance(results.OLD, OURS[0], activations, root, port, FORMATS[:1]))
        if options.peer is not None:
            found.append(Star(options.peer))
        return found

    def _measure(self, form: str, rate: int | None, running: dict[str, Running]) -> None:
        """Measure all loads, with the systems taking turns."""
        order = list(running)
        for system in running.values():
            ask(system, WARM.calls(len(DEVICES), self._model.vocabulary, self._options.seed))
        for load in (load for load in LOADS if load.name in self._options.loads):
            cell = Cell(form, rate, load.name, {name: [] for name in running})
            self._cells.append(cell)
            for repeat in range(self._options.repeats):
                seed = self._options.seed * self._options.repeats + repeat
                calls = load.calls(len(DEVICES), self._model.vocabulary, seed)
                order = order[1:] + order[:1]
                for name in order:
                    cell.figures[name].append(measure(running[name], calls))
                speeds = ", ".join(
                    f"{name} {cell.speed(found[-1]):.1f}" for name, found in cell.figures.items()
                )
                say(f"{cell.where}, {repeat + 1} of {self._options.repeats}: {speeds} tokens/s")


if __name__ == "__main__":
    sys.exit(main())
