"""Quotas of cores: servers compute for a while at full speed, and then as their quota lets them.

A kernel that gives a group of processes a share of the cores does not slow it down evenly. It runs
at full speed until its quota is used up, and is stopped for a part of every period from then on;
after a while of waiting there is quota again. So a short step costs what it would alone, and a
server with much to do pays for it. Periods are not simulated: quota comes in all the time and is
saved up to a burst, a token bucket as links have, from which all threads of a server draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from research.simulator.scenario import Speed


class Shares:
    """What all servers have saved.

    Args:
        speeds: of each server.
    """

    def __init__(self, speeds: Sequence[Speed]) -> None:
        #: By server: something stops it.
        self.limited = [speed.quota < math.inf for speed in speeds]
        self._quota = [speed.quota for speed in speeds]
        self._burst = [speed.burst for speed in speeds]
        #: Processor seconds; below 0 while a computation runs that is stopped.
        self._saved = list(self._burst)
        self._at = [0.0] * len(speeds)

    def spend(self, server: int, now: float, seconds: float, processor: float) -> float:
        """What a computation takes.

        Args:
            server: one that is limited.
            now: when it begins; never less than in a call before for this server.
            seconds: that it takes if nothing stops it.
            processor: seconds of all its threads.
        """
        quota = self._quota[server]
        saved = self._saved[server] + quota * (now - self._at[server])
        saved = min(saved, self._burst[server])
        self._saved[server], self._at[server] = saved - processor, now
        return max(seconds, (processor - saved) / quota)
