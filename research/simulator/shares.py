"""Quotas of cores: a server computes at full speed for a while, then as fast as its quota allows.

A kernel that limits a group of processes to a share of the cores does not slow it down evenly. The
group runs at full speed until its quota is used up, and from then on is stopped for a part of every
period; after some waiting there is quota again. So a short step takes no longer than without a
quota, but a busy server is slowed down. Periods are not simulated: quota flows into a token bucket,
as for links, which holds at most a burst, and from which all threads of a server draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from research.simulator.scenario import Speed


class Shares:
    """The token buckets of all servers.

    Args:
        speeds: of each server.
    """

    def __init__(self, speeds: Sequence[Speed]) -> None:
        #: For each server, whether it has a quota.
        self.limited = [speed.quota < math.inf for speed in speeds]
        self._quota = [speed.quota for speed in speeds]
        self._burst = [speed.burst for speed in speeds]
        #: Processor seconds; below 0 while a computation that is stopped runs.
        self._saved = list(self._burst)
        self._at = [0.0] * len(speeds)

    def spend(self, server: int, now: float, seconds: float, processor: float) -> float:
        """Seconds that a computation takes, stops included.

        Args:
            server: a server with a quota.
            now: when the computation begins; never less than in an earlier call for this server.
            seconds: that it takes without stops.
            processor: processor seconds of all its threads.
        """
        quota = self._quota[server]
        saved = self._saved[server] + quota * (now - self._at[server])
        saved = min(saved, self._burst[server])
        self._saved[server], self._at[server] = saved - processor, now
        return max(seconds, (processor - saved) / quota)
