"""Where the time of an engine's steps goes."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Mapping

#: Seconds of which the longest step is known.
WINDOW_S = 10.0


class StepClock:
    """Seconds by part of the steps, which follow each other without a gap.

    It is called several times in each step: (measured) context managers for the parts took 4 % of
    the processor time of a decode outside the C++ library.

    Parts: "schedule" plans; "wait" is for other servers' first bytes, "exchange" moves rows,
    "experts" computes them (these three where the C++ library does it, else they are 0);
    "compute" is the rest of the device's step; "output" makes text of what was sampled.

    Args:
        inside: seconds of "wait", "exchange" and "experts" since the process began, by the C++
            library's own count.
    """

    def __init__(self, inside: Callable[[], Mapping[str, float]]) -> None:
        self._inside = inside
        self._counted = inside()
        self._seconds: dict[str, float] = dict.fromkeys(
            ("schedule", "compute", "experts", "wait", "exchange", "output"), 0.0
        )
        #: time.perf_counter() at begin and end of each part of the latest step; all of "computing".
        self.spans: dict[str, tuple[float, float]] = {}
        #: (when it ended, seconds) of the steps in the window that no later one was as long as.
        self._long: collections.deque[tuple[float, float]] = collections.deque()

    def start(self) -> None:
        """A step begins."""
        self._began = self._lap = time.perf_counter()

    def end(self) -> None:
        """The step has ended."""
        ended = time.perf_counter()
        seconds = ended - self._began
        while self._long and self._long[-1][1] <= seconds:
            self._long.pop()
        self._long.append((ended, seconds))

    @property
    def longest(self) -> float:
        """Seconds of the longest step that ended in the last WINDOW_S; 0: none did."""
        while self._long and self._long[0][0] < time.perf_counter() - WINDOW_S:
            self._long.popleft()
        return self._long[0][1] if self._long else 0.0

    def ended(self, part: str) -> None:
        """What the step did since its last part counts for this one."""
        self._seconds[part] += self._span(part)

    def computed(self) -> None:
        """The devices have run the step since its last part."""
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
        """Since this clock was made."""
        return dict(self._seconds)
