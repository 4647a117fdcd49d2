"""Measure what servers that step independently cost each other: `python research/apart.py`.

    python research/apart.py                                   # over loopback
    python research/apart.py --links 100Mbps                   # on a testbed, as root
    python research/apart.py --sections processor --old DIR    # another checkout's servers

research/independent/__init__.py describes what is measured and how.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
import tempfile

# A script's import path has only its own folder; add the repository root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Only the servers compute; this process needs no accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"

from rich.console import Console

from benchmarks.arguments import add_check, some_of
from benchmarks.command import EXAMPLES, ROOT, verdict
from benchmarks.live.places import Place
from benchmarks.namespaces import Testbed, hosts_like, parse_rate
from benchmarks.namespaces.temporary import add_bed, add_testbed, again_on, testbed
from benchmarks.targets import plain_targets
from dance_jax.bench.arguments import count, positive
from dance_jax.bench.cluster import RunError
from dance_jax.bench.http import HttpError
from dance_jax.bench.report import write_json
from dance_jax.bench.terminal import exit_code, terminal
from dance_jax.config import UserError
from dance_jax.launch.cli.prompts import check_writable
from research.independent import hosts, loopback

LOOPBACK = ("processor", "stopped", "killed")
#: Sections on a testbed; `many` needs its own testbed, with more hosts.
ON_HOSTS, MANY = ("beside", "bytes"), ("many",)
WIDTH = 120

Result = loopback.Processor | loopback.Failure | hosts.Beside | hosts.Many | hosts.Bytes


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python research/apart.py",
        description="Measures what servers that step independently cost each other, on the demo "
        "model.",
        epilog="Options after -- are passed to dance_jax.launch, e.g. -- --policy dance",
    )
    add = parser.add_argument
    add(
        "--links",
        type=parse_rate,
        metavar="RATE",
        help="run the sections that need a testbed, with links of this rate (needs root on Linux)",
    )
    known = (*LOOPBACK, *ON_HOSTS, *MANY)
    add(
        "--sections",
        type=some_of(known),
        metavar="A,B",
        help=f"some of: {', '.join(known)} (without --links {','.join(LOOPBACK)}; with --links "
        f"{','.join(ON_HOSTS)})",
    )
    add("--repeats", type=count, default=3, help="repetitions of each section (%(default)s)")
    add(
        "--rate",
        type=positive,
        default=0.3,
        help="requests/s per host in the section many (%(default)s)",
    )
    add(
        "--old",
        type=pathlib.Path,
        metavar="DIR",
        help="measure the servers of this other checkout instead",
    )
    add_testbed(parser, "apart")
    add_bed(parser)
    add_check(parser)
    add("--output", type=pathlib.Path, metavar="JSON", help="write results here")
    add("launch", nargs="*", help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    options, console = parser().parse_args(words), terminal(WIDTH)

    def work() -> int:
        sections = check(options)
        if options.links is not None and options.bed is None:
            return on_testbeds(options, sections, words, console)
        found: dict[str, Result] = {}
        for section in sections:
            found[section] = measured(options, section)
            console.print(found[section].line(), soft_wrap=True)
        targets = [target for result in found.values() for target in result.targets()]
        if options.output is not None:
            plain = {name: dataclasses.asdict(result) for name, result in found.items()}
            write_json(options.output, vars(options), plain | plain_targets(targets))
        return verdict(console, targets, options.check)

    return exit_code(work, RunError, HttpError)


def check(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the sections to run.

    Raises:
        UserError: a section cannot run with or without --links, or the result cannot be written.
    """
    sections = options.sections or (LOOPBACK if options.links is None else ON_HOSTS)
    places = (LOOPBACK,) if options.links is None else (ON_HOSTS, MANY)
    if not any(set(sections) <= set(place) for place in places):
        shown = " or ".join(", ".join(place) for place in places)
        links = "without" if options.links is None else "with"
        raise UserError(f"--sections {','.join(sections)}: {links} --links only {shown} can run")
    if options.output is not None:
        check_writable(options.output, "--output")
    return sections


def on_testbeds(
    options: argparse.Namespace, sections: tuple[str, ...], words: list[str], console: Console
) -> int:
    """Run the same command again, inside a testbed; return its exit code."""
    if sections == MANY:
        template = "\n".join(f"host{n} experts={hosts.SLOTS}" for n in range(1, hosts.ALL + 1))
    else:
        template = (EXAMPLES / "hosts.txt").read_text()
    bed = testbed(
        options.name,
        hosts_like(template),
        options.links,
        options.cores,
        console,
        options.round_trip,
    )
    with bed as made:
        return again_on(made, __file__, words)


def measured(options: argparse.Namespace, section: str) -> Result:
    """Measure one section."""
    root = ROOT if options.old is None else options.old.absolute()
    repeats, words = options.repeats, options.launch
    if section == "processor":
        return loopback.processor(repeats, root, words)
    if section in ("stopped", "killed"):
        with tempfile.TemporaryDirectory(prefix="dance-jax-apart-") as folder:
            fail = getattr(loopback, section)
            return fail(repeats, root, words, pathlib.Path(folder))
    bed = Testbed.load(options.bed)
    place = Place(bed.write_hosts(measure=False), bed, root)
    if section == "many":
        return hosts.many(bed, place, repeats, options.rate, words)
    if section == "beside":
        return hosts.beside(bed, place, repeats, words)
    return hosts.bytes_sent(bed, place, words)


if __name__ == "__main__":
    sys.exit(main())
