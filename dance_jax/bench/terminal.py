"""What a command shows on the terminal, and the code that it ends with."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dance_jax import signals
from dance_jax.config import UserError

#: Exit code: a target was missed, or the measured program failed.
FAILED = 1
#: Exit code: the user must change something (an option, a file).
WRONG = 2
#: Exit code: Ctrl-C.
INTERRUPTED = 130
#: Redraws of a progress bar per second; few, because it shares the machine with the servers.
REFRESHES_PER_S = 2


def exit_code(work: Callable[[], int], *failures: type[Exception]) -> int:
    """Run a command's work and return its exit code; print the error if it ends with one.

    SIGTERM and SIGHUP raise SystemExit, so that processes started by `work` are cleaned up; an
    ignored signal stays ignored.

    Args:
        work: the command; returns an exit code.
        failures: errors of the measured program, for which the code is FAILED. UserError and
            other OSErrors give WRONG.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signals.handle(number, lambda number, _: sys.exit(128 + number))
    try:
        return work()
    except failures as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("interrupted: the run was not finished, no results were kept", file=sys.stderr)
        return INTERRUPTED


def terminal(width: int) -> Console:
    """Return the console for tables; `width` in columns applies when stdout is not a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = width
    return console


@contextlib.contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar on a terminal for the block; yield a function that advances it."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        refresh_per_second=REFRESHES_PER_S,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
