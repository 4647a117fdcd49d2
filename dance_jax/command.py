"""The console script: `dance-jax serve|batch|plan|preflight|convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

#: Of `python -m dance_jax.launch`: what it is told first, and what the command does.
_LAUNCHES = {
    "serve": ((), "serve a model on the servers of a hosts file, with OpenAI's API"),
    "batch": ((), "answer the prompts of a file (--prompts) and end"),
    "plan": (("--dry-run",), "show who would hold what, and start nothing"),
    "preflight": (("--preflight",), "check every server and link, and start nothing"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process with its exit code."""
    parser = argparse.ArgumentParser(
        prog="dance-jax",
        description="One Mixture-of-Experts model, served by several unequal machines on slow "
        "links. `dance-jax COMMAND --help` shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"dance_jax {version('dance-jax')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text) in _LAUNCHES.items():
        commands.add_parser(name, help=text, add_help=False)
    commands.add_parser("convert", help="convert a model once, by hand", add_help=False)
    options, rest = parser.parse_known_args(arguments)
    prog = f"dance-jax {options.command}"
    if options.command == "convert":
        # Here, not above: each command imports only what it needs.
        from dance_jax.models import convert

        sys.exit(convert.main(rest, prog))
    from dance_jax.launch.__main__ import process

    first, _ = _LAUNCHES[options.command]
    if options.command in ("serve", "batch"):
        words = {word.split("=")[0] for word in rest}
        batch = "--prompts" in words
        # A file of options may have the prompts.
        if batch != (options.command == "batch") and not words & {"-h", "--help", "--config"}:
            other = "needs --prompts" if not batch else "takes no --prompts: use dance-jax batch"
            parser.error(f"{options.command} {other}")
    process([*first, *rest], prog)
