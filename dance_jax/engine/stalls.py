"""Says when sequences wait for experts that nobody gives, and when they go on."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np

from dance_jax.models.counters import PeerCounters

log = logging.getLogger(__name__)

#: Seconds between two times that the log says so: a server that is gone must not flood it.
QUIET_S = 10.0


class Stalls:
    """Follows a server's sequences that wait for experts.

    Args:
        names: of all servers, by rank.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._failed = np.zeros(len(names), np.int64)
        #: Servers that hold what sequences wait for, since it was last all there.
        self._holders: set[str] = set()
        self._since = 0.0
        #: The log has said so, and when it last did.
        self._said, self._said_at = False, -QUIET_S

    def failed(self, peers: Sequence[PeerCounters]) -> None:
        """Sequences of a step have failed; what was counted of each server by then."""
        rows = np.array([peer.failed_rows for peer in peers], np.int64)
        self._holders |= {self._names[n] for n in np.flatnonzero(rows > self._failed).tolist()}
        self._failed = rows

    def update(self, waiting: int) -> None:
        """So many sequences wait for experts now; after every step, whether it computed or not."""
        now = time.monotonic()
        holders = sorted(self._holders)
        if waiting:
            self._since = self._since or now
            if not self._said and now >= self._said_at + QUIET_S:
                who = "that no server holds"
                if holders:
                    do = "do" if holders[1:] else "does"
                    who = f"of {', '.join(holders)}, which {do} not answer"
                what = "sequences wait" if waiting > 1 else "sequence waits"
                log.warning("%d %s for experts %s", waiting, what, who)
                self._said, self._said_at = True, now
        elif self._since:
            if self._said:
                whose = f" of {', '.join(holders)}" if holders else ""
                text = "no sequence waits for experts%s any more, after %.1f s"
                log.warning(text, whose, now - self._since)
            self._holders.clear()
            self._said, self._since = False, 0.0
