"""Log messages for sequences that stall because experts are unavailable."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np

from dance_jax.models.counters import PeerCounters

log = logging.getLogger(__name__)

#: Minimum seconds between two warnings, so that an unreachable server does not flood the log.
QUIET_S = 10.0


class Stalls:
    """Tracks a server's sequences that wait for experts, and logs when they stall and resume.

    Args:
        names: names of all servers, by rank.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._failed = np.zeros(len(names), np.int64)
        #: Servers that hold the missing experts, collected since no sequence was last waiting.
        self._holders: set[str] = set()
        self._since = 0.0
        #: Whether the current stall has been logged, and the time of the last warning.
        self._warned, self._warned_at = False, -QUIET_S

    def failed(self, peers: Sequence[PeerCounters]) -> None:
        """Note that sequences of a step failed.

        Args:
            peers: the counters of each server after the step, by rank.
        """
        rows = np.array([peer.failed_rows for peer in peers], np.int64)
        self._holders |= {self._names[n] for n in np.flatnonzero(rows > self._failed).tolist()}
        self._failed = rows

    def update(self, waiting: int) -> None:
        """Log a change of stalls; call this after every step, even an empty one.

        Args:
            waiting: number of sequences that wait for experts now.
        """
        now = time.monotonic()
        holders = sorted(self._holders)
        if waiting:
            self._since = self._since or now
            if not self._warned and now >= self._warned_at + QUIET_S:
                which = "that no server holds"
                if holders:
                    do = "do" if holders[1:] else "does"
                    which = f"of {', '.join(holders)}, which {do} not answer"
                what = "sequences wait" if waiting > 1 else "sequence waits"
                log.warning("%d %s for experts %s", waiting, what, which)
                self._warned, self._warned_at = True, now
        elif self._since:
            if self._warned:
                of_servers = f" of {', '.join(holders)}" if holders else ""
                text = "no sequence waits for experts%s any more, after %.1f s"
                log.warning(text, of_servers, now - self._since)
            self._holders.clear()
            self._warned, self._since = False, 0.0
