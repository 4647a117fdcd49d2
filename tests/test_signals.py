"""Signals that this process ignores stay ignored."""

from __future__ import annotations

import os
import signal

import pytest

from dance_jax import signals


@pytest.mark.parametrize("ignored", [True, False])
def test_an_ignored_signal_stays_ignored(ignored: bool) -> None:
    number, heard = signal.SIGUSR2, []
    before = signal.signal(number, signal.SIG_IGN if ignored else lambda *_: None)
    try:
        assert signals.ignored(number) == ignored
        signals.handle(number, lambda number, _: heard.append(number))
        os.kill(os.getpid(), number)
        assert heard == ([] if ignored else [number])
    finally:
        signal.signal(number, before)
