"""Lose processes, hosts and links of a service under load: `benchmarks/chaos.py --help`.

    python benchmarks/chaos.py                               # three servers on loopback
    python benchmarks/chaos.py --seconds 1800 --every 20     # a soak
    python benchmarks/chaos.py --testbed 100Mbps             # three hosts on slow links; root
    python benchmarks/chaos.py --testbed 100Mbps --nodes     # each with its own launcher, no ssh

Every server has the same number of requests in flight all the time, greedy and seeded, half of them
streamed. Each answer is compared with the one before the first fault. One fault after another is
made; the table says for each what its users noticed. On the testbed the launcher runs on the first
host, and users send their requests over their server's link.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import pathlib
import secrets
import sys
import tempfile
from collections.abc import Iterator

# A script's import path has only its own folder; add the repository root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import psutil
from rich.console import Console

from benchmarks.faults import schedule
from benchmarks.faults.beds import Bed, Hosts, Loopback
from benchmarks.faults.kinds import FAULTS, kill_launcher
from benchmarks.faults.report import Report, show, show_all
from benchmarks.namespaces import Testbed, hosts_like, parse_rate
from benchmarks.namespaces.machine import install_missing
from benchmarks.namespaces.temporary import add_bed, add_testbed, again_on, testbed
from dance_jax.bench.arguments import add_seed, count, positive
from dance_jax.bench.cluster import LAUNCHER, RunError, started
from dance_jax.bench.http import Address, HttpError
from dance_jax.bench.terminal import exit_code, terminal
from dance_jax.config import UserError
from dance_jax.files import whole_file
from dance_jax.launch.cli.stop import stop
from dance_jax.launch.planning.hosts import parse_hosts, read_hosts

#: Any two of them can hold the demo model.
HOSTS = """\
alpha address=localhost devices=1 memory=9MiB   bandwidth=500Mbps
beta  address=localhost devices=1 memory=9MiB   bandwidth=500Mbps
gamma address=localhost devices=2 memory=4.5MiB bandwidth=500Mbps
"""
#: HTTP port on each host of a testbed; seconds for all processes to end.
PORT, END_S = 8000, 15.0
WIDTH = 160


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/chaos.py",
        description="Loses processes, hosts and links of a service under load, and measures what "
        "its users notice.",
    )
    add = parser.add_argument
    add("--hosts", type=pathlib.Path, help="hosts file (default: three servers)")
    add("--seconds", type=positive, default=120.0, help="(default: %(default)g)")
    add(
        "--every",
        type=positive,
        default=1e-3,
        metavar="SECONDS",
        help="from one fault to the next (default: once all is whole)",
    )
    add("--in-flight", type=count, default=10, help="requests on each server (%(default)s)")
    add(
        "--faults",
        type=lambda text: text.split(";"),
        help="names with ; between them, of: "
        f"{'; '.join(FAULTS).replace('%', '%%')} (default: all that can be made)",
    )
    add(
        "--testbed",
        type=parse_rate,
        metavar="RATE",
        help="make a testbed of hosts on links of this rate, such as 100Mbps (root, on Linux)",
    )
    add(
        "--nodes", action="store_true", help="start each host's server with --node-rank, not by ssh"
    )
    add("--output", type=pathlib.Path, help="JSON file for the results")
    add("launch", nargs="*", metavar="-- OPTION", help="further options of dance_jax.launch")
    add_seed(parser, "of the schedule of faults")
    add_testbed(parser, "chaos")
    parser.set_defaults(cores="none")
    add_bed(parser)
    return parser


def main() -> int:
    """Run the benchmark; returns 1 if a living front end lost or changed a request."""
    options = parser().parse_args()
    check(options)
    console = terminal(WIDTH)
    if options.testbed is None or options.bed is not None:
        return lose(options, console)
    install_missing(["nft"])  # the hosts reach no package registry
    like = HOSTS if options.hosts is None else options.hosts.read_text()
    with testbed(
        options.name,
        hosts_like(like),
        options.testbed,
        options.cores,
        console,
        options.round_trip,
    ) as bed:
        return again_on(bed, __file__, sys.argv[1:])


def check(options: argparse.Namespace) -> None:
    """Fill in and check the options.

    Raises:
        UserError: a fault is unknown or cannot be made, or options contradict each other.
    """
    possible = [
        name
        for name, fault in FAULTS.items()
        if (options.testbed is not None or not fault.hosts)
        # The servers of nodes end with their launcher.
        and not (options.nodes and fault.make is kill_launcher)
    ]
    options.faults = possible if options.faults is None else options.faults
    for name in options.faults:
        if name not in FAULTS:
            raise UserError(f"--faults: {name!r} is unknown; the faults are {'; '.join(FAULTS)}")
        if name not in possible:
            what = "ends a launch with --nodes" if options.nodes else "needs --testbed"
            raise UserError(f"--faults: {name!r} {what}")
    if options.nodes and options.testbed is None:
        raise UserError("--nodes needs --testbed")


def lose(options: argparse.Namespace, console: Console) -> int:
    """Start the service, make the faults, and end the service."""
    reports: list[Report] = []

    def say(report: Report) -> None:
        reports.append(report)
        show(console, report)

    with contextlib.ExitStack() as stack:
        work = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        if options.bed is None:
            bed: Bed = stack.enter_context(loopback(options, work))
        else:
            bed = stack.enter_context(hosts(options, Testbed.load(options.bed), work))
        asyncio.run(
            schedule.run(
                bed,
                options.faults,
                options.seed,
                options.seconds,
                options.every,
                options.in_flight,
                say,
                console.print,
            )
        )
        processes = bed.processes()
    _, left = psutil.wait_procs(list(processes), timeout=END_S)
    ports = bed.listening()
    show_all(console, reports)
    console.print(f"At the end: processes left {len(left)}, ports left {len(ports)}.")
    if options.output is not None:
        found = {
            "seed": options.seed,
            "faults": [dataclasses.asdict(report) for report in reports],
            "processes_left": [process.pid for process in left],
            "ports_left": ports,
        }
        with whole_file(options.output) as file:
            file.write(json.dumps(found, indent=1).encode())
    return int(bool(left or ports or any(report.failed for report in reports)))


@contextlib.contextmanager
def loopback(options: argparse.Namespace, work: pathlib.Path) -> Iterator[Bed]:
    """Run the service on this machine for the block."""
    file = options.hosts
    if file is None:
        file = work / "hosts.txt"
        file.write_text(HOSTS)
    spec = read_hosts(file)
    state = work / "state"
    state.mkdir()
    try:
        arguments = ["--hosts", str(file), "--state-dir", str(state), *options.launch]
        with started(spec, arguments) as cluster:
            asyncio.run(cluster.ready())
            yield Loopback(cluster, spec.names)
    finally:
        stop(state, now=True)  # a launcher that was killed has left its servers


@contextlib.contextmanager
def hosts(options: argparse.Namespace, bed: Testbed, work: pathlib.Path) -> Iterator[Bed]:
    """Run the service on a testbed's hosts for the block, launched from the first."""
    file, key = work / "hosts.txt", work / "key"
    file.write_text(bed.write_hosts(measure=False).read_text())
    spec = parse_hosts(file.read_text())
    first, *others = spec.names
    common = ["--hosts", str(file), "--bind", "0.0.0.0", "--state-dir", str(work / "state")]
    common += options.launch
    if options.nodes:
        key.touch(mode=0o600)
        key.write_text(secrets.token_hex(32))
        common += ["--key-file", str(key)]
        own = ["--node-rank", "0"]
    else:
        own = ["--ssh-config", bed.let_launch(first)]
    ranks = {name: str(rank) for rank, name in enumerate(spec.names)}
    agents = {
        name: [*LAUNCHER, *common, "--port", str(PORT), "--node-rank", ranks[name]]
        for name in (others if options.nodes else ())
    }
    addresses = [Address(name, PORT) for name in spec.names]
    with started(
        spec,
        [*common, *own],
        addresses,
        elsewhere=lambda command: bed.command(first, command),
    ) as cluster:
        found = Hosts(cluster, spec.names, bed, agents)
        with contextlib.closing(found):
            asyncio.run(cluster.ready())
            yield found


if __name__ == "__main__":
    sys.exit(exit_code(main, RunError, HttpError))
