"""Experts that follow the workload, measured: `python benchmarks/migrate.py`.

What is measured, and how, is said in benchmarks/shifting.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import signal
import sys
import tempfile

# Run as a script, only this folder would be searched.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# The servers compute, this process does not.
os.environ["JAX_PLATFORMS"] = "cpu"

from rich.console import Console

from benchmarks.arguments import count, count_or_0, positive
from benchmarks.namespaces import Testbed, parse_rate
from benchmarks.namespaces.cores import MODES, QUOTA
from benchmarks.serving.cluster import ClusterError
from benchmarks.serving.http import HttpError
from benchmarks.serving.report import write_json
from benchmarks.shifting import plots, runs, tables
from benchmarks.shifting.places import Place, again_on, testbed
from benchmarks.shifting.results import Results, plain
from benchmarks.shifting.runs import INTERVALS, SECTIONS, Setting
from benchmarks.shifting.tasks import Askers, Task, read_task
from benchmarks.targets import Target, chosen_sections
from dance_jax.config import UserError
from dance_jax.launch.defaults import demo_dir, engine_config
from dance_jax.launch.hosts import read_hosts
from dance_jax.launch.prompts import check_writable
from dance_jax.models.hf import read_config
from dance_jax.models.tokenizer import Tokenizer

MISSED, WRONG, INTERRUPTED = 1, 2, 130
EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
#: Columns of the terminal, where it does not say.
WIDTH = 120


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/migrate.py",
        description="Experts that follow the workload: every server's users change to another "
        "task, with and without migration.",
        epilog="What follows -- goes to dance_jax.launch, e.g. -- --max-num-seqs 8",
    )
    add = parser.add_argument
    add("--hosts", type=pathlib.Path, help="servers of this machine (examples/hosts.txt)")
    add("--model", type=pathlib.Path, metavar="DIR", help="(the demo)")
    add(
        "--links",
        type=parse_rate,
        metavar="RATE",
        help="run on a testbed with links of this rate, e.g. 20Mbps (root, Linux); without it on "
        "this machine, where links cost nothing",
    )
    add("--cores", choices=MODES, default=QUOTA, help="of the testbed's hosts (%(default)s)")
    add("--name", default="migrate", help="of the testbed that is made (%(default)s)")
    add(
        "--tasks",
        type=pathlib.Path,
        metavar="DIR",
        help="*.jsonl with prompts: the first files are what each server's users ask before the "
        "shift, the next ones after it (examples/tasks)",
    )
    add("--requests", type=count, default=200, help="of each server, before and after the shift")
    add("--rate", type=positive, default=0.6, help="of each server, requests/s (%(default)s)")
    add("--max-tokens", type=count, default=64, help="of an answer at most (%(default)s)")
    add(
        "--interval",
        type=positive,
        metavar="S",
        help=f"from one decision to the next (a {INTERVALS}th of a phase)",
    )
    add("--seed", type=count_or_0, default=0, help="of arrivals and texts (%(default)s)")
    add("--sections", type=_sections, default=SECTIONS, metavar="A,B", help=", ".join(SECTIONS))
    add("--check", action="store_true", help="exit code 1 if a target is missed")
    add("--output", type=pathlib.Path, metavar="JSON")
    add("--plot", type=pathlib.Path, metavar="PNG")
    # This program again, inside a testbed that is up.
    add("--bed", help=argparse.SUPPRESS)
    add("launch", nargs="*", help=argparse.SUPPRESS)
    return parser


def _sections(text: str) -> tuple[str, ...]:
    return chosen_sections(text, SECTIONS)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(words)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    try:
        check(options)
        if options.links is not None and options.bed is None:
            text = options.hosts.read_text()
            with testbed(options.name, text, options.links, options.cores, console) as bed:
                return again_on(bed, __file__, words)
        found = measure(options, console)
    except (ClusterError, HttpError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISSED
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        return INTERRUPTED
    console.print("Targets")
    for target in found:
        console.print(target.line(), markup=False, soft_wrap=True)
    return MISSED if options.check and any(target.missed for target in found) else 0


def check(options: argparse.Namespace) -> None:
    """Completes the options.

    Raises:
        UserError: something is missing, or a result cannot be written.
    """
    options.hosts = (options.hosts or EXAMPLES / "hosts.txt").absolute()
    options.interval = options.interval or options.requests / options.rate / INTERVALS
    spec = read_hosts(options.hosts)
    if elsewhere := [server.name for server in spec.servers if server.ssh is not None]:
        raise UserError(f"{', '.join(elsewhere)}: on another machine; --links makes a testbed here")
    if len(spec.servers) < 2:
        raise UserError(f"{options.hosts}: nothing moves on one server")
    phases(options, len(spec.servers))
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'dance-jax[bench]'")
    for name in ("output", "plot"):
        if (path := getattr(options, name)) is not None:
            check_writable(path, f"--{name}")


def phases(options: argparse.Namespace, servers: int) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """Each server's task, before and after the shift.

    Raises:
        UserError: there are too few, or one cannot be read.
    """
    directory = options.tasks or EXAMPLES / "tasks"
    files = sorted(directory.glob("*.jsonl" if options.tasks else "*.heldout.jsonl"))
    if len(files) <= servers:
        raise UserError(f"{directory}: {len(files)} files *.jsonl; more than servers are needed")
    tasks = [read_task(file) for file in files]
    return tuple(tasks[:servers]), tuple(tasks[n % len(tasks)] for n in range(servers, 2 * servers))


def measure(options: argparse.Namespace, console: Console) -> list[Target]:
    """The sections, where they are to run; writes the results."""
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
            # What was measured is kept, whatever becomes of the next section.
            if options.output is not None:
                write_json(options.output, vars(options), plain(results), results.targets())
            if options.plot is not None:
                plots.draw(results, options.plot)
    return results.targets()


if __name__ == "__main__":
    sys.exit(main())
