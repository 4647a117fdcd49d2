"""Signals of this process."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any


def ignored(number: signal.Signals) -> bool:
    """Whether this process ignores a signal.

    A process inherits that from its parent: nohup makes its command ignore SIGHUP, and a shell
    without job control makes its background commands ignore SIGINT.
    """
    return signal.getsignal(number) is signal.SIG_IGN


def handle(number: signal.Signals, handler: Callable[[int, Any], object]) -> None:
    """Call `handler` on a signal, unless the signal is ignored: then it stays ignored."""
    if not ignored(number):
        signal.signal(number, handler)
