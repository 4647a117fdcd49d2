"""Run several calls at the same time, without letting any of them delay the program's end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")


def at_once(
    calls: Sequence[Callable[[], Result]], timeout_s: float | None = None
) -> list[Result | Exception]:
    """Run each call in a thread of its own.

    The threads are daemons and late ones are not waited for, so Ctrl-C ends the wait.

    Args:
        calls: without arguments.
        timeout_s: seconds for all calls together; None: no limit.

    Returns:
        What each call returned or raised, in order; TimeoutError for late calls.
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
