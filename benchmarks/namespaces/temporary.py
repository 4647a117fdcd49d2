"""A testbed for the duration of one run, and scripts that re-run themselves inside it."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console

from .bed import Testbed
from .cores import MODES, QUOTA, describe
from .hosts import HEAD, Host, parse_seconds
from .leftovers import down


def add_testbed(parser: argparse.ArgumentParser, name: str) -> None:
    """Add --cores, --round-trip and --name, whose default is `name`."""
    add = parser.add_argument
    add("--cores", choices=MODES, default=QUOTA, help="of the testbed's hosts (%(default)s)")
    add_round_trip(parser)
    add("--name", default=name, help="of the testbed that is made (%(default)s)")


def add_round_trip(parser: argparse.ArgumentParser) -> None:
    """Option --round-trip."""
    parser.add_argument(
        "--round-trip",
        type=parse_seconds,
        default=0.0,
        metavar="TIME",
        help="added to the round trip between two hosts, e.g. 10ms (0)",
    )


def add_bed(parser: argparse.ArgumentParser) -> None:
    """Add the hidden option --bed: the testbed that the re-run script is in; see `again_on`."""
    parser.add_argument("--bed", help=argparse.SUPPRESS)


@contextlib.contextmanager
def testbed(
    name: str,
    hosts: Sequence[Host],
    rate: int | None,
    cores: str,
    console: Console,
    round_trip: float = 0.0,
) -> Iterator[Testbed]:
    """Create a testbed for the block and always remove it; arguments as of `Testbed.up`."""
    bed = Testbed.up(name, hosts, rate, cores, round_trip)
    try:
        console.print(describe(bed.hosts.values(), bed.cores), soft_wrap=True)
        yield bed
    finally:
        down(name)


def again_on(bed: Testbed, script: str, words: Sequence[str]) -> int:
    """Run a script again, on the head of a testbed with --bed; return its exit code.

    Args:
        bed: the testbed.
        script: path of the script.
        words: the script's arguments.
    """
    path = str(pathlib.Path(script).resolve())
    # In its own process group: the script gets a signal once, when this process passes it on.
    process = bed.exec(
        HEAD,
        [sys.executable, path, "--bed", bed.name, *words],
        stdin=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        return process.wait()
    finally:
        process.terminate()
        process.wait()
