"""Several calls at the same time, none of which can keep the program from ending."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")


def at_once(
    calls: Sequence[Callable[[], Result]], timeout_s: float | None = None
) -> list[Result | Exception]:
    """Runs each call in a thread of its own.

    The threads are daemons and nobody waits for one that is late, so Ctrl-C ends the wait.

    Args:
        calls: without arguments.
        timeout_s: seconds that all of them have.

    Returns:
        What each returned or raised, in their order; TimeoutError for those that are late.
    """
    results: list[Result | Exception] = [TimeoutError("timed out") for _ in calls]
    done = threading.Semaphore(0)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error
        finally:
            done.release()

    for index in range(len(calls)):
        threading.Thread(target=run, args=(index,), daemon=True).start()
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    for _ in calls:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not done.acquire(timeout=left):
            break
    return list(results)
