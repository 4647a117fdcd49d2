"""Simulate several hosts on slow links in one machine: `benchmarks/testbed.py up|run|exec|down`.

benchmarks/namespaces/__init__.py describes the hosts and has examples.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterable, Sequence

# A script's import path has only its own folder; add the repository root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from rich.table import Table

from benchmarks.command import EXAMPLES
from benchmarks.namespaces import leftovers
from benchmarks.namespaces.bed import Testbed
from benchmarks.namespaces.cores import MODES, QUOTA, describe, show_share
from benchmarks.namespaces.hosts import HEAD, MAX_HOSTS, hosts_like, parse_rate, show_rate
from benchmarks.namespaces.machine import check_root
from benchmarks.namespaces.temporary import add_round_trip
from dance_jax.bench.terminal import exit_code, terminal
from dance_jax.config import UserError
from dance_jax.placement.activations import Activations

PROMPTS, ACTIVATIONS = EXAMPLES / "prompts.jsonl", EXAMPLES / "activations.npz"
#: Seconds that ssh sessions have to end after the launch.
GRACE_S = 12.0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. `run` passes unknown options to dance_jax.launch."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/testbed.py",
        description="Runs several hosts on slow links in one machine, as network namespaces. Needs "
        "root on Linux.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    about = {
        "up": "create the hosts and their links",
        "run": "run dance_jax.launch on the head, with the hosts as its servers; other options "
        "are passed to dance_jax.launch, by default those of the example prompts",
        "exec": "run a command on a host or the head",
        "down": "remove the testbed and end all its processes",
    }
    for command, text in about.items():
        sub = commands.add_parser(command, help=text, description=text, allow_abbrev=False)
        sub.add_argument(
            "--name", type=_name, default="main", help="name of the testbed (%(default)s)"
        )
        if command == "up":
            _add_up(sub)
        if command == "run":
            sub.add_argument(
                "--bandwidth",
                choices=("auto", "link"),
                default="auto",
                help="bandwidth in the hosts file: auto has dance_jax.launch measure the links, "
                "link states their rates (%(default)s)",
            )
        if command == "exec":
            sub.add_argument("host")
            sub.add_argument("argv", nargs=argparse.REMAINDER, metavar="command ...")
    return parser


def _add_up(up: argparse.ArgumentParser) -> None:
    up.add_argument(
        "--hosts", type=_count, help="number of hosts (default: one per line of --like)"
    )
    up.add_argument(
        "--rate",
        type=parse_rate,
        default="500Mbps",
        help="rate of each link in each direction: 500Mbps, 500Mbit (the same) or none "
        "(%(default)s)",
    )
    add_round_trip(up)
    up.add_argument("--cores", choices=MODES, default=QUOTA, help="how shared out (%(default)s)")
    up.add_argument(
        "--like",
        type=pathlib.Path,
        default=EXAMPLES / "hosts.txt",
        help="hosts file with the hosts' names, devices and memory; its lines repeat if --hosts is "
        "larger (examples/hosts.txt)",
    )


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]{1,20}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name of 1 to 20 letters and digits")
    return text


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= MAX_HOSTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MAX_HOSTS}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options, others = parser().parse_known_args(arguments)
    if others and options.command != "run":
        parser().error(f"unknown options: {' '.join(others)}")
    return exit_code(lambda: command(options, others))


def command(options: argparse.Namespace, others: list[str]) -> int:
    """Run one of the commands; `run` passes `others` to dance_jax.launch."""
    match options.command:
        case "up":
            return up(options)
        case "run":
            return run(Testbed.load(options.name), others, options.bandwidth == "auto")
        case "exec":
            return execute(Testbed.load(options.name), options.host, options.argv)
        case _:
            check_root()
            leftovers.down(options.name)
            return 0


def up(options: argparse.Namespace) -> int:
    """Create a testbed and describe it."""
    try:
        hosts = hosts_like(options.like.read_text(), options.hosts)
    except (OSError, ValueError) as error:
        raise UserError(f"--like {options.like}: {error}") from error
    bed = Testbed.up(options.name, hosts, options.rate, options.cores, options.round_trip)
    if options.cores != bed.cores:
        print("this machine has no usable cpu quota (cgroup): pinning the hosts to cores instead")
    print(f"testbed {bed.name} is up: {', '.join(bed.hosts)}; links {show_rate(options.rate)}")
    print(describe(bed.hosts.values(), bed.cores))
    return 0


def execute(bed: Testbed, host: str, argv: Sequence[str]) -> int:
    """Replace this process with a command on a host or the head."""
    if host != HEAD and host not in bed.hosts:
        raise UserError(f"unknown host {host}: choose from {HEAD}, {', '.join(bed.hosts)}")
    command = bed.command(host, argv or [os.environ.get("SHELL", "sh")])
    os.execvp(command[0], command)


def run(bed: Testbed, launch_options: list[str], measure: bool) -> int:
    """Run dance_jax.launch on the head and return its exit code.

    Args:
        bed: the testbed.
        launch_options: options of dance_jax.launch; if empty, those of the example prompts.
        measure: have dance_jax.launch measure the links.
    """
    if any(word.split("=")[0] in ("--hosts", "--ssh-config") for word in launch_options):
        raise UserError("leave out --hosts and --ssh-config: the testbed sets them")
    print(describe(bed.hosts.values(), bed.cores), flush=True)
    command = [sys.executable, "-m", "dance_jax.launch"]
    command += ["--hosts", str(bed.write_hosts(measure)), "--ssh-config", str(bed.ssh_config)]
    running, before = set(bed.processes()), bed.counters()
    command += launch_options or example_options(bed.hosts)
    # In its own process group: it gets each signal once, when this process passes the signal on.
    code = _wait(bed.exec(HEAD, command, stdin=subprocess.DEVNULL, process_group=0))
    left = _left(bed, running)
    print_links(bed, before)
    for pid, line in left.items():
        print(f"warning: still running in the testbed: process {pid}: {line}", file=sys.stderr)
    return code


def example_options(hosts: Iterable[str]) -> list[str]:
    """Return launch options for the example prompts.

    Experts are placed by the example activations if these know all hosts.
    """
    options = ["--prompts", str(PROMPTS)]
    if missing := set(hosts) - set(Activations.load(ACTIVATIONS).servers):
        print(
            f"the example activations have no hosts {', '.join(sorted(missing))}: experts are "
            "placed without activations"
        )
        return options
    return [*options, "--activations", str(ACTIVATIONS)]


def _wait(process: subprocess.Popen) -> int:
    """Wait for a process, pass on signals that ask this process to end; return the exit code."""

    def pass_on(number: int, frame: types.FrameType | None) -> None:
        process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    code = process.wait()
    return code if code >= 0 else 128 - code


def _left(bed: Testbed, before: set[int]) -> dict[int, str]:
    """Return processes that the launch left running, after ssh sessions had GRACE_S to end."""
    deadline = time.monotonic() + GRACE_S
    while True:
        left = {pid: line for pid, line in bed.processes().items() if pid not in before}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def print_links(bed: Testbed, before: dict[str, tuple[int, int]]) -> None:
    """Print each host's traffic since `before`, with its link's rate and its share of cores."""
    table = Table(title="Traffic of the hosts' interfaces", title_justify="left")
    table.add_column("host")
    for column in ("link", "bytes received", "bytes sent", "cores"):
        table.add_column(column, justify="right")
    for name, (received, sent) in bed.counters().items():
        table.add_row(
            name,
            show_rate(bed.rates[name]),
            f"{received - before[name][0]:,}",
            f"{sent - before[name][1]:,}",
            show_share(bed.hosts[name].share),
        )
    terminal(120).print(table)


if __name__ == "__main__":
    sys.exit(main())
