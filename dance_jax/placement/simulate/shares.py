"""Shares of cores: servers compute for a while at full speed, and then as their quota lets them.

A kernel that gives a group of processes a share of the cores does not slow it down evenly. It runs
at full speed until its quota is used up, and is stopped for a part of every period from then on;
after a while of waiting there is quota again. So a short step costs what it would alone, and a
server with much to do pays for it. Periods are not simulated: quota comes in all the time and is
saved up to a burst, a token bucket as links have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dance_jax.placement.simulate.scenario import Speed


class Shares:
    """What all servers have saved; n servers.

    Args:
        speeds: of each server; those with a share of 1 are never stopped.
    """

    def __init__(self, speeds: Sequence[Speed]) -> None:
        self._share_n = np.array([speed.share for speed in speeds])
        self._burst_n = np.array([speed.burst for speed in speeds])
        self._saved_n = self._burst_n.copy()
        self._at_n = np.zeros(len(speeds))

    def spend(self, seconds_n: np.ndarray, at_n: np.ndarray) -> np.ndarray:
        """Computes; call it in the order of each server's time.

        Args:
            seconds_n: float64 [n], that it takes if nothing stops it.
            at_n: float64 [n], when it begins.

        Returns:
            float64 [n]: that it takes.
        """
        share_n = self._share_n
        rest_n = np.maximum(at_n - self._at_n, 0)
        saved_n = np.minimum(self._saved_n + share_n * rest_n, self._burst_n)
        # While it computes it uses 1 and gets its share, until nothing is left.
        taken_n = np.maximum(seconds_n, (seconds_n - saved_n) / share_n)
        self._saved_n = saved_n + share_n * taken_n - seconds_n
        self._at_n = at_n + taken_n
        return taken_n
