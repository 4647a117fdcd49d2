"""Command lines of benchmarks: words, options that several have, and their checks."""

from __future__ import annotations

import argparse
import importlib.util
import math
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import TypeVar

from dance_jax.config import UserError
from dance_jax.launch.cli.prompts import check_writable
from dance_jax.placement import POLICIES

Value = TypeVar("Value")


def count(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def count_or_0(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def policy_name(word: str) -> str:
    """The name of a placement policy."""
    if word not in POLICIES:
        raise argparse.ArgumentTypeError(f"no policy {word!r}; there are {', '.join(POLICIES)}")
    return word


def _whole(text: str, least: int) -> int:
    digits = text.isascii() and text.isdigit() and len(text) <= 10
    if not digits or not least <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return int(text)


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def list_of(one: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Words with commas between."""
    return lambda text: [one(word) for word in text.split(",")]


def some_of(known: Sequence[str], what: str = "section") -> Callable[[str], tuple[str, ...]]:
    """Words with commas between that are among the known ones; in the order of `known`."""

    def chosen(text: str) -> tuple[str, ...]:
        words = text.split(",")
        for word in words:
            if word not in known:
                there = ", ".join(known)
                raise argparse.ArgumentTypeError(f"no {what} {word!r}; there are {there}")
        return tuple(word for word in known if word in words)

    return chosen


def add_service(parser: argparse.ArgumentParser) -> None:
    """Option --model, and what follows -- as `launch`: of servers that are started."""
    parser.add_argument("--model", type=pathlib.Path, metavar="DIR", help="(the demo)")
    parser.add_argument("launch", nargs="*", help=argparse.SUPPRESS)


def add_users(parser: argparse.ArgumentParser, requests: int, asked: str) -> None:
    """Options --requests, --rate and --max-tokens.

    Args:
        requests: by default.
        asked: what their number is of.
    """
    add = parser.add_argument
    add("--requests", type=count, default=requests, help=f"{asked} (%(default)s)")
    add("--rate", type=positive, default=0.6, help="of each server, requests/s (%(default)s)")
    add("--max-tokens", type=count, default=64, help="of an answer at most (%(default)s)")


def add_seed(parser: argparse.ArgumentParser, of: str) -> None:
    """Option --seed."""
    parser.add_argument("--seed", type=count_or_0, default=0, help=f"{of} (%(default)s)")


def add_check(parser: argparse.ArgumentParser) -> None:
    """Option --check."""
    parser.add_argument("--check", action="store_true", help="exit code 1 if a target is missed")


def add_results(parser: argparse.ArgumentParser) -> None:
    """Options --check, --output and --plot; see `check_results`."""
    add_check(parser)
    parser.add_argument("--output", type=pathlib.Path, metavar="JSON")
    parser.add_argument("--plot", type=pathlib.Path, metavar="PNG")


def check_results(options: argparse.Namespace) -> None:
    """Before minutes of measuring.

    Raises:
        UserError: one of the files --output and --plot cannot be made.
    """
    if options.plot is not None:
        check_module("matplotlib", "--plot")
    for name in ("output", "plot"):
        if (path := getattr(options, name)) is not None:
            check_writable(path, f"--{name}")


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Option --output; see `check_folder`."""
    use = "for result.json and the plots"
    parser.add_argument("--output", type=pathlib.Path, metavar="DIR", help=use)


def check_folder(options: argparse.Namespace) -> None:
    """Makes the directory --output, if it is asked for; before minutes of measuring.

    Raises:
        UserError: there can be no files in it, or no plots.
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
    """
    Raises:
        UserError: a module of the extra `bench` is missing, without which there is no `what`.
    """
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{what} needs {name}: pip install 'dance-jax[bench]'")
