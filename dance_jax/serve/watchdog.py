"""Notices an engine that makes no progress."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable

from dance_jax.launch.control.protocol import Pulse

#: Seconds between two checks; this process was stopped itself if they are further apart than
#: PAUSE_S.
CHECK_S, PAUSE_S = 0.5, 3.0
#: Seconds without a sign of life, which comes every second, after which an engine is silent.
SILENT_S = 2.5
#: An engine that uses its cores but makes no progress is given so many times longer: a layer of a
#: long prompt, or the copy of a large file, may take that long on a slow machine.
BUSY_FACTOR = 10


class Watchdog:
    """Watches one engine process.

    An engine makes progress if its steps do, waiting for other servers included. While it starts
    and compiles, only a process that does nothing at all counts as hung.

    Args:
        limit_s: seconds without progress after which the engine is hung.
        pid: of the engine.
        clock: monotonic time in seconds.
    """

    def __init__(
        self, limit_s: float, pid: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit_s, self._pid, self._clock = limit_s, pid, clock
        self._pulse = Pulse("starting", 0.0, 0.0)
        self._checked = self._heard = self._worked = clock()
        self._work: object = None
        self._silent = False

    @property
    def silent(self) -> bool:
        """Whether other servers should do without the engine for the moment."""
        return self._silent

    def heard(self, pulse: Pulse) -> None:
        """Take in a sign of life."""
        self._pulse, self._heard = pulse, self._clock()

    def verdict(self) -> str:
        """Why the engine is hung; "" if it is not. Call this every CHECK_S."""
        now = self._clock()
        if now - self._checked > PAUSE_S:
            self._heard = now
        self._checked = now
        work = _work(self._pid)
        if work != self._work:
            self._work, self._worked = work, now
        silent_s, still_s = now - self._heard, now - self._worked
        doing = self._pulse.doing
        self._silent = min(silent_s, still_s) > SILENT_S
        if self._hung(min(silent_s, still_s), silent_s):
            return f"gave no sign of life for {silent_s:.0f} s; it was {doing}"
        if self._hung(self._pulse.still_s, self._pulse.stalled_s):
            return f"made no progress for {self._pulse.stalled_s:.0f} s; it was {doing}"
        return ""

    def _hung(self, still_s: float, stalled_s: float) -> bool:
        return still_s > self._limit_s or stalled_s > BUSY_FACTOR * self._limit_s


def _work(pid: int) -> object:
    """A value that changes while a process works; always None where the system does not tell.

    A process that waits for a disk works as well.
    """
    with contextlib.suppress(OSError):
        # After the name in parentheses: state, ten other fields, user and system time in ticks.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return time.monotonic() if fields[0] == "D" else (fields[11], fields[12])
    return None
