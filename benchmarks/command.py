"""Behaviour that all benchmark commands share: exit codes, signals, terminal output, verdict."""

from __future__ import annotations

import pathlib
import signal
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from benchmarks.targets import Target
from dance_jax.config import UserError

#: Exit codes: a target was missed or the measured program failed; the user must change something
#: (an option, a file); Ctrl-C.
MISSED, WRONG, INTERRUPTED = 1, 2, 130
EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"


def exit_code(work: Callable[[], int], *failures: type[Exception]) -> int:
    """Run a command's work and return its exit code; print the error if it ends with one.

    SIGTERM and SIGHUP raise SystemExit, so that processes started by `work` are cleaned up.

    Args:
        work: the command; returns an exit code.
        failures: errors of the measured program, for which the code is MISSED. UserError and
            other OSErrors give WRONG.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Signals that nohup ignores stay ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        return work()
    except failures as error:
        print(f"error: {error}", file=sys.stderr)
        return MISSED
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        return INTERRUPTED


def terminal(width: int) -> Console:
    """Return the console for tables; `width` in columns applies when stdout is not a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = width
    return console


def say(line: str) -> None:
    """Print a line of progress to stderr, apart from the results."""
    print(line, file=sys.stderr, flush=True)


def verdict(console: Console, found: Sequence[Target], check: bool) -> int:
    """Print the targets and return the exit code.

    Args:
        check: return MISSED if a target is missed; otherwise return 0 in any case.
    """
    if found:
        console.print("Targets")
    for target in found:
        console.print(target.line(), markup=False, soft_wrap=True)
    return MISSED if check and any(target.missed for target in found) else 0
