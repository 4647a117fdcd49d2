"""Accounting of the time of an engine's steps, by part."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Mapping

#: Seconds over which the longest step is tracked.
WINDOW_S = 10.0


class StepClock:
    """Measures the seconds spent in each part of the steps; the parts cover a step without gaps.

    The clock is called several times in each step. It has no context managers for the parts because
    they took 4 % of the CPU time of a decode outside the C++ library (measured).

    Parts: "schedule" plans; "wait" waits for other servers' first bytes, "exchange" moves rows, and
    "experts" computes them (these three are 0 unless the C++ library does them); "compute" is the
    rest of the device's step; "output" turns sampled tokens into text.

    Args:
        inside: returns the seconds of "wait", "exchange" and "experts" since the process started,
            as counted by the C++ library.
    """

    def __init__(self, inside: Callable[[], Mapping[str, float]]) -> None:
        self._inside = inside
        self._counted = inside()
        self._seconds: dict[str, float] = dict.fromkeys(
            ("schedule", "compute", "experts", "wait", "exchange", "output"), 0.0
        )
        #: time.perf_counter() at begin and end of each part of the latest step; "computing" covers
        #: the whole device step.
        self.spans: dict[str, tuple[float, float]] = {}
        #: (end time, seconds) of those steps in the window that are longer than all later ones.
        self._long: collections.deque[tuple[float, float]] = collections.deque()

    def start(self) -> None:
        """Begin a step."""
        self._began = self._lap = time.perf_counter()

    def end(self) -> None:
        """End the step."""
        ended = time.perf_counter()
        seconds = ended - self._began
        while self._long and self._long[-1][1] <= seconds:
            self._long.pop()
        self._long.append((ended, seconds))

    @property
    def longest(self) -> float:
        """Seconds of the longest step that ended in the last WINDOW_S; 0 if there is none."""
        while self._long and self._long[0][0] < time.perf_counter() - WINDOW_S:
            self._long.popleft()
        return self._long[0][1] if self._long else 0.0

    def ended(self, part: str) -> None:
        """End a part: the time since the end of the previous part counts for this one."""
        self._seconds[part] += self._span(part)

    def computed(self) -> None:
        """End the device's step and divide its time into parts by the C++ library's counts."""
        rest, before = self._span("computing"), self._counted
        self._counted = self._inside()
        for name, seconds in self._counted.items():
            spent = min(seconds - before[name], rest)
            self._seconds[name] += spent
            rest -= spent
        self._seconds["compute"] += rest

    def _span(self, name: str) -> float:
        began, self._lap = self._lap, time.perf_counter()
        self.spans[name] = began, self._lap
        return self._lap - began

    def seconds(self) -> dict[str, float]:
        """Seconds by part since this clock was created."""
        return dict(self._seconds)
