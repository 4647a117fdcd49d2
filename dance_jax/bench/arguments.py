"""Options of a run under load: their types, defaults and checks."""

from __future__ import annotations

import argparse
import math
import pathlib

from dance_jax.config import UserError

#: Defaults of a run under load: requests, requests per second of each server, tokens per answer.
REQUESTS, RATE, MAX_TOKENS = 100, 1.0, 256


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _whole(text, 1)


def count_or_0(text: str) -> int:
    """Parse a whole number of at least 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    digits = text.isascii() and text.isdigit() and len(text) <= 10
    if not digits or not least <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def positive(text: str) -> float:
    """Parse a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def add_seed(parser: argparse.ArgumentParser, help: str) -> None:
    """Add --seed with a help text, to which the default is appended."""
    parser.add_argument("--seed", type=count_or_0, default=0, help=f"{help} (default: %(default)s)")


def add_load(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run under load; see `check_load`."""
    add = parser.add_argument
    add(
        "--prompts",
        type=pathlib.Path,
        metavar="FILE",
        help="file of prompts, as --prompts of dance_jax.launch",
    )
    coming = parser.add_mutually_exclusive_group()
    coming.add_argument("--rate", type=positive, help=f"requests/s per server (default: {RATE:g})")
    coming.add_argument(
        "--trace",
        type=pathlib.Path,
        metavar="CSV",
        help="replay the arrivals and lengths of a trace in the format of the Azure traces",
    )
    add("--speedup", type=positive, help="how much faster to replay the trace (default: 1)")
    add(
        "--requests",
        type=count,
        help=f"total requests (default: {REQUESTS}, or one for each line of --prompts; no limit "
        "with --duration)",
    )
    add(
        "--duration", type=positive, help="seconds during which requests arrive (default: no limit)"
    )
    add("--max-tokens", type=count, help=f"maximum tokens per answer (default: {MAX_TOKENS})")
    add_seed(parser, "seed of arrivals, lengths and texts")


def check_load(options: argparse.Namespace) -> None:
    """Check the options of a run under load.

    Args:
        options: those of `add_load`; `url`, the URLs of running servers; `launch`, the launcher's
            arguments.

    Raises:
        UserError: options contradict each other.
    """
    if options.speedup is not None and options.trace is None:
        raise UserError("--speedup needs --trace")
    if options.prompts is not None and options.trace is not None:
        raise UserError(
            "--trace and --prompts both set the prompts' lengths: give only one of them"
        )
    if options.url and options.launch:
        raise UserError(
            f"{options.launch[0]}: no server is launched where URLs are given; leave out the "
            "options after --"
        )
