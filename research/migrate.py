"""Measure how experts follow a changing workload: `python research/migrate.py`.

research/shifting/__init__.py describes what is measured and how.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import tempfile

# A script's import path has only its own folder; add the repository root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Only the servers compute; this process needs no accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"

from rich.console import Console

from benchmarks.arguments import add_results, add_service, add_users, check_results, some_of
from benchmarks.command import EXAMPLES, verdict
from benchmarks.live.places import Place
from benchmarks.live.tasks import Askers, Task, read_task
from benchmarks.namespaces import Testbed, hosts_like, parse_rate
from benchmarks.namespaces.temporary import add_bed, add_testbed, again_on, testbed
from benchmarks.targets import Target, plain_targets
from dance_jax.bench.arguments import add_seed, count, positive
from dance_jax.bench.cluster import RunError
from dance_jax.bench.http import HttpError
from dance_jax.bench.report import write_json
from dance_jax.bench.terminal import exit_code, terminal
from dance_jax.config import UserError
from dance_jax.launch.planning.defaults import engine_config
from dance_jax.launch.planning.hosts import read_hosts
from dance_jax.models.directory import demo_dir, read_config
from dance_jax.models.tokenizer import Tokenizer
from research.shifting import plots, runs, tables
from research.shifting.results import Results, plain
from research.shifting.runs import INTERVALS, SECTIONS, Setting

#: Columns of the tables when stdout is not a terminal.
WIDTH = 120


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python research/migrate.py",
        description="Measures how experts follow the workload: every server's users change to "
        "another task, with and without migration.",
        epilog="Options after -- are passed to dance_jax.launch, e.g. -- --max-num-seqs 8",
    )
    add = parser.add_argument
    add(
        "--hosts",
        type=pathlib.Path,
        help="hosts file with servers on this machine (examples/hosts.txt)",
    )
    add_service(parser)
    add(
        "--links",
        type=parse_rate,
        metavar="RATE",
        help="run on a testbed with links of this rate, e.g. 20Mbps (needs root on Linux); "
        "otherwise on this machine, where links have no limit",
    )
    add_testbed(parser, "migrate")
    add_bed(parser)
    add(
        "--tasks",
        type=pathlib.Path,
        metavar="DIR",
        help="directory of *.jsonl files with prompts: the first files are the servers' tasks "
        "before the shift, the next files those after the shift (examples/tasks)",
    )
    add_users(parser, 200, "requests per server, before the shift and again after it")
    add(
        "--streams",
        type=count,
        default=4,
        help="streams per server in the section pause (%(default)s)",
    )
    add(
        "--interval",
        type=positive,
        metavar="S",
        help=f"seconds between two placement decisions (1/{INTERVALS} of a phase)",
    )
    add_seed(parser, "seed of arrivals and texts")
    sections = f"some of: {', '.join(SECTIONS)} (all)"
    add("--sections", type=some_of(SECTIONS), default=SECTIONS, metavar="A,B", help=sections)
    add_results(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    options, console = parser().parse_args(words), terminal(WIDTH)

    def work() -> int:
        check(options)
        if options.links is not None and options.bed is None:
            hosts = hosts_like(options.hosts.read_text())
            with testbed(
                options.name, hosts, options.links, options.cores, console, options.round_trip
            ) as bed:
                return again_on(bed, __file__, words)
        return verdict(console, measure(options, console), options.check)

    return exit_code(work, RunError, HttpError)


def check(options: argparse.Namespace) -> None:
    """Fill in and check the options.

    Raises:
        UserError: the hosts or tasks do not fit, or a result cannot be written.
    """
    options.hosts = (options.hosts or EXAMPLES / "hosts.txt").absolute()
    options.interval = options.interval or options.requests / options.rate / INTERVALS
    spec = read_hosts(options.hosts)
    if elsewhere := [server.name for server in spec.servers if server.ssh is not None]:
        raise UserError(
            f"{', '.join(elsewhere)}: on another machine; use only servers on this machine, or "
            "--links for a testbed here"
        )
    if len(spec.servers) < 2:
        raise UserError(
            f"{options.hosts}: has only one server; experts need at least two to move between"
        )
    phases(options, len(spec.servers))
    check_results(options)


def phases(options: argparse.Namespace, servers: int) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """Return each server's task before and after the shift.

    Raises:
        UserError: there are too few task files, or a file cannot be read.
    """
    directory = options.tasks or EXAMPLES / "tasks"
    files = sorted(directory.glob("*.jsonl" if options.tasks else "*.heldout.jsonl"))
    if len(files) <= servers:
        raise UserError(
            f"{directory}: {len(files)} files *.jsonl, but more files than servers ({servers}) are "
            "needed"
        )
    tasks = [read_task(file) for file in files]
    return tuple(tasks[:servers]), tuple(tasks[n % len(tasks)] for n in range(servers, 2 * servers))


def measure(options: argparse.Namespace, console: Console) -> list[Target]:
    """Measure the sections, print and write their results, and return the targets."""
    bed = None if options.bed is None else Testbed.load(options.bed)
    model = options.model or demo_dir()
    with tempfile.TemporaryDirectory(prefix="dance-jax-migrate-") as work:
        setting = Setting(
            place=Place(options.hosts, bed),
            askers=Askers(
                Tokenizer.load(model),
                engine_config(read_config(model)).max_model_len,
                options.max_tokens,
                options.rate,
                options.seed,
            ),
            phases=phases(options, len(read_hosts(options.hosts).servers)),
            requests=options.requests,
            streams=options.streams,
            interval_s=options.interval,
            model=("--model", str(model.absolute())) if options.model else (),
            serving=tuple(options.launch),
            work=pathlib.Path(work),
            console=console,
        )
        before, after = setting.names(0), setting.names(1)
        console.print(f"before the shift: {before}; after it: {after}", soft_wrap=True)
        results = Results()
        for section in options.sections:
            setattr(results, section, getattr(runs, section)(setting))
            tables.show(console, section, setting.place.spec.names, results)
            # Write after each section, in case the next one fails.
            if options.output is not None:
                found = plain(results) | plain_targets(results.targets())
                write_json(options.output, vars(options), found)
            if options.plot is not None:
                plots.draw(results, options.plot)
    return results.targets()


if __name__ == "__main__":
    sys.exit(main())
