"""What all benchmark commands share: this checkout, lines of progress, and the verdict."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from rich.console import Console

from benchmarks.targets import Target
from dance_jax.bench.terminal import FAILED

#: This checkout, whose code the benchmarks measure.
ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def say(line: str) -> None:
    """Print a line of progress to stderr, apart from the results."""
    print(line, file=sys.stderr, flush=True)


def verdict(console: Console, found: Sequence[Target], check: bool) -> int:
    """Print the targets and return the exit code.

    Args:
        check: return FAILED if a target is missed; otherwise return 0 in any case.
    """
    if found:
        console.print("Targets")
    for target in found:
        console.print(target.line(), markup=False, soft_wrap=True)
    return FAILED if check and any(target.missed for target in found) else 0
