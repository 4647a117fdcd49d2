"""What commands of benchmarks do alike: exit codes, signals, the terminal and the verdict."""

from __future__ import annotations

import pathlib
import signal
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from benchmarks.targets import Target
from dance_jax.config import UserError

#: Exit codes: a target is missed or what was measured failed; something must be changed; Ctrl-C.
MISSED, WRONG, INTERRUPTED = 1, 2, 130
EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"


def exit_code(work: Callable[[], int], *failures: type[Exception]) -> int:
    """Exit code of a command's work: its own, or that of the error it ends with, which is told.

    SIGTERM and SIGHUP end it as SystemExit, so that what it started is cleaned up.

    Args:
        failures: errors of what is measured, MISSED; those of the user are WRONG.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        # What nohup ignores stays ignored.
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
    """Where tables go; the width in columns is for where there is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = width
    return console


def say(line: str) -> None:
    """Progress, beside the results."""
    print(line, file=sys.stderr, flush=True)


def verdict(console: Console, found: Sequence[Target], check: bool) -> int:
    """Prints targets; the exit code is MISSED if one is and it counts.

    Args:
        check: it counts.
    """
    if found:
        console.print("Targets")
    for target in found:
        console.print(target.line(), markup=False, soft_wrap=True)
    return MISSED if check and any(target.missed for target in found) else 0
