"""Command-line helpers for the benchmarks: argument types, shared options, and their checks."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import TypeVar

from dance_jax.bench.arguments import count, positive
from dance_jax.config import UserError
from dance_jax.launch.cli.prompts import check_writable
from dance_jax.placement.policies import POLICIES

Value = TypeVar("Value")


def policy_name(word: str) -> str:
    """Parse the name of a placement policy."""
    if word not in POLICIES:
        raise argparse.ArgumentTypeError(
            f"unknown policy {word!r}; choose from {', '.join(POLICIES)}"
        )
    return word


def list_of(one: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Return an argument type for comma-separated values, each parsed by `one`."""
    return lambda text: [one(word) for word in text.split(",")]


def some_of(known: Sequence[str], what: str = "section") -> Callable[[str], tuple[str, ...]]:
    """Return an argument type for comma-separated words out of `known`, sorted as in `known`."""

    def chosen(text: str) -> tuple[str, ...]:
        words = text.split(",")
        for word in words:
            if word not in known:
                choices = ", ".join(known)
                raise argparse.ArgumentTypeError(f"unknown {what} {word!r}; choose from {choices}")
        return tuple(word for word in known if word in words)

    return chosen


def add_service(parser: argparse.ArgumentParser) -> None:
    """Add --model and, as `launch`, the words after --: both for servers that are started here."""
    parser.add_argument(
        "--model", type=pathlib.Path, metavar="DIR", help="model to serve (the demo model)"
    )
    parser.add_argument("launch", nargs="*", help=argparse.SUPPRESS)


def add_users(parser: argparse.ArgumentParser, requests: int, asked: str) -> None:
    """Add --requests, --rate and --max-tokens.

    Args:
        requests: default of --requests.
        asked: help text of --requests: what it counts.
    """
    add = parser.add_argument
    add("--requests", type=count, default=requests, help=f"{asked} (%(default)s)")
    add("--rate", type=positive, default=0.6, help="requests/s per server (%(default)s)")
    add("--max-tokens", type=count, default=64, help="maximum tokens per answer (%(default)s)")


def add_check(parser: argparse.ArgumentParser) -> None:
    """Add --check."""
    parser.add_argument(
        "--check", action="store_true", help="exit with code 1 if a target is missed"
    )


def add_results(parser: argparse.ArgumentParser) -> None:
    """Add --check, --output and --plot; see `check_results`."""
    add_check(parser)
    parser.add_argument("--output", type=pathlib.Path, metavar="JSON", help="write results here")
    parser.add_argument("--plot", type=pathlib.Path, metavar="PNG", help="draw results here")


def check_results(options: argparse.Namespace) -> None:
    """Check --output and --plot before minutes of measuring.

    Raises:
        UserError: one of the files cannot be written, or matplotlib is missing.
    """
    if options.plot is not None:
        check_module("matplotlib", "--plot")
    for name in ("output", "plot"):
        if (path := getattr(options, name)) is not None:
            check_writable(path, f"--{name}")


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Add --output; see `check_folder`."""
    use = "directory for result.json and the plots"
    parser.add_argument("--output", type=pathlib.Path, metavar="DIR", help=use)


def check_folder(options: argparse.Namespace) -> None:
    """Create the directory --output, if given, before minutes of measuring.

    Raises:
        UserError: the directory cannot be written to, or matplotlib is missing.
    """
    if (directory := options.output) is None:
        return
    check_module("matplotlib", "--output")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"--output: {directory} cannot be written to: {error.strerror}") from error


def check_module(name: str, what: str) -> None:
    """Check that module `name` of the extra `bench`, which `what` needs, is installed.

    Raises:
        UserError: the module is missing.
    """
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{what} needs {name}: pip install 'dance-jax[bench]'")
