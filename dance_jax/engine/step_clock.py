"""Where the time of an engine's steps goes."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

#: Seconds of which the longest step is known.
WINDOW_S = 10.0


class StepClock:
    """Seconds by part of the steps.

    Parts: "schedule" plans; "wait" is for other servers' first bytes, "exchange" moves rows,
    "experts" computes them (these three where the C++ library does it, else they are 0);
    "compute" is the rest of the device's step; "output" makes text of what was sampled.

    Args:
        inside: seconds of "wait", "exchange" and "experts" since the process began, by the C++
            library's own count.
    """

    def __init__(self, inside: Callable[[], Mapping[str, float]]) -> None:
        self._inside = inside
        self._seconds: dict[str, float] = dict.fromkeys(
            ("schedule", "compute", "experts", "wait", "exchange", "output"), 0.0
        )
        #: time.perf_counter() at begin and end of each part of the latest step; all of "computing".
        self.spans: dict[str, tuple[float, float]] = {}
        #: (when it ended, seconds) of the steps in the window that no later one was as long as.
        self._long: collections.deque[tuple[float, float]] = collections.deque()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A whole step."""
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        while self._long and self._long[-1][1] <= ended - began:
            self._long.pop()
        self._long.append((ended, ended - began))

    @property
    def longest(self) -> float:
        """Seconds of the longest step that ended in the last WINDOW_S; 0: none did."""
        while self._long and self._long[0][0] < time.perf_counter() - WINDOW_S:
            self._long.popleft()
        return self._long[0][1] if self._long else 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens within counts for the part."""
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        self._seconds[name] += ended - began
        self.spans[name] = began, ended

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Within it the devices run a step."""
        began, before = time.perf_counter(), self._inside()
        yield
        ended = time.perf_counter()
        self.spans["computing"] = began, ended
        rest = ended - began
        for name, seconds in self._inside().items():
            spent = min(seconds - before[name], rest)
            self._seconds[name] += spent
            rest -= spent
        self._seconds["compute"] += rest

    def seconds(self) -> dict[str, float]:
        """Since this clock was made."""
        return dict(self._seconds)
