"""The console script: `dance-jax serve|batch|plan|preflight|convert|bench|hosts|stop`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

#: Commands of `python -m dance_jax.launch`: options that are put first, and the help text.
_LAUNCHES = {
    "serve": ((), "serve a model on the servers of a hosts file, with OpenAI's API"),
    "batch": ((), "complete the prompts of a file (--prompts), then exit"),
    "plan": (("--dry-run",), "show which server would hold what, without starting servers"),
    "preflight": (("--preflight",), "check every server and link, without starting servers"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and end the process with its exit code."""
    parser = argparse.ArgumentParser(
        prog="dance-jax",
        description="Serves one Mixture-of-Experts model on several unequal machines with slow "
        "links. `dance-jax COMMAND --help` shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"dance_jax {version('dance-jax')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text) in _LAUNCHES.items():
        commands.add_parser(name, help=text, add_help=False)
    commands.add_parser("convert", help="convert a model ahead of time", add_help=False)
    commands.add_parser("bench", help="measure running servers over HTTP", add_help=False)
    commands.add_parser(
        "hosts", help="add servers to a running service, or remove them", add_help=False
    )
    commands.add_parser("stop", help="end a service by its --state-dir", add_help=False)
    words = list(sys.argv[1:] if arguments is None else arguments)
    # The command reads its own words itself, with the -- among them.
    options, rest = parser.parse_args(words[:1]), words[1:]
    prog = f"dance-jax {options.command}"
    if options.command == "convert":
        # Imported here, so that each command imports only what it needs.
        from dance_jax.models import convert

        sys.exit(convert.main(rest, prog))
    if options.command == "bench":
        from dance_jax.bench import main as bench

        sys.exit(bench.main(rest, prog))
    if options.command == "hosts":
        from dance_jax.launch.cli import hosts

        sys.exit(hosts.main(rest, prog))
    if options.command == "stop":
        from dance_jax.launch.cli import stop

        sys.exit(stop.main(rest, prog))
    from dance_jax.launch.__main__ import process

    first, _ = _LAUNCHES[options.command]
    process([*first, *rest], prog, {"serve": False, "batch": True}.get(options.command))
