"""The placement of experts as reported by the launcher, and users' requests for decisions."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from dance_jax.launch.control.protocol import Decided, Decision, Placed, RebalanceWanted
from dance_jax.serve.queue import Unavailable

if TYPE_CHECKING:
    from dance_jax.placement.core import Layout

_ENDS = "the server is shutting down"
_LOST = "the launcher does not answer; the servers go on, but experts move only once it is back"


def _no_launcher(wanted: RebalanceWanted) -> None:
    raise Unavailable("experts cannot move: this server runs without a launcher")


class PlacementState:
    """Where experts are, by the launcher's latest report; used only on the event loop.

    Args:
        layout: the layout at the start.
        ask: sends a request to the launcher.
    """

    def __init__(
        self, layout: Layout, ask: Callable[[RebalanceWanted], None] = _no_launcher
    ) -> None:
        self.layout = layout
        #: See `protocol.Placed`.
        self.version = 1
        self.last_decision: Decision | None = None
        self.migrations = self.failures = self.experts_migrated = 0
        #: Number of the membership; ranks of the servers that do not run.
        self.epoch = 1
        self.absent: frozenset[int] = frozenset()
        self.home = b""
        #: The layout that the migration under way leads to, encoded; empty: nothing moves.
        self.target = b""
        #: Number of decisions reported to this server.
        self.decisions = 0
        #: Whether a launcher is there.
        self.launcher = True
        self._ask = ask
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Decision]] = {}
        self._closed = False

    def placed(self, placed: Placed, layout: Layout) -> None:
        """Take over a changed placement.

        Args:
            placed: the launcher's report.
            layout: `placed.layout`, decoded.
        """
        self.layout, self.version = layout, placed.version
        self.epoch, self.absent = placed.epoch, frozenset(placed.absent)
        before, latest = self.last_decision, placed.last_decision
        if latest is not None and (before is None or before.when != latest.when):
            self.decisions += 1
        self.last_decision = placed.last_decision
        self.migrations, self.failures = placed.migrations, placed.failures
        self.experts_migrated = placed.experts_migrated
        self.home, self.target = placed.home, placed.target

    def report(self) -> Placed:
        """What is known here, for a launcher that takes over."""
        return Placed(
            version=self.version,
            layout=self.layout.to_bytes(),
            last_decision=self.last_decision,
            migrations=self.migrations,
            failures=self.failures,
            experts_migrated=self.experts_migrated,
            epoch=self.epoch,
            absent=sorted(self.absent),
            home=self.home,
        )

    def decided(self, decided: Decided) -> None:
        """Pass the launcher's answer to the `decision` call that waits for it."""
        future = self._asked.get(decided.id)
        if future is None or future.done():
            return
        if decided.decision is None:
            future.set_exception(Unavailable(decided.why))
        else:
            future.set_result(decided.decision)

    async def decision(
        self, force: bool, dry_run: bool, resident: list[list[list[int]]] | None = None
    ) -> Decision:
        """Ask the launcher for a decision and wait for it.

        Args:
            force: move experts whatever the cost.
            dry_run: decide only; move no experts.
            resident: [server][layer], ids of the experts to place there; None to use the policy's
                placement.

        Raises:
            Unavailable: there is no launcher, the decision failed, or the service shuts down.
        """
        if self._closed:
            raise Unavailable(_ENDS)
        if not self.launcher:
            raise Unavailable(_LOST)
        number = next(self._numbers)
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._ask(RebalanceWanted(number, force, dry_run, resident))
            return await future
        finally:
            del self._asked[number]

    def launcher_lost(self) -> None:
        """Fail all pending requests for decisions: the launcher that got them is gone."""
        self._fail(_LOST)

    def close(self) -> None:
        """Fail all pending requests for decisions, and later ones."""
        self._closed = True
        self._fail(_ENDS)

    def _fail(self, why: str) -> None:
        for future in self._asked.values():
            if not future.done():
                future.set_exception(Unavailable(why))
