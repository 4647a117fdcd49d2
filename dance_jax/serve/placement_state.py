"""Where experts are, as the launcher says, and what users ask it about that."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from dance_jax.launch.control.protocol import Decided, Decision, Placed, RebalanceWanted
from dance_jax.serve.queue import Unavailable

if TYPE_CHECKING:
    from dance_jax.placement.core import Layout


def _nobody(wanted: RebalanceWanted) -> None:
    raise Unavailable("no launcher moves experts here")


class PlacementState:
    """The latest from the launcher; everything happens on the event loop.

    Args:
        layout: at the start.
        ask: tells the launcher something.
    """

    def __init__(self, layout: Layout, ask: Callable[[RebalanceWanted], None] = _nobody) -> None:
        self.layout = layout
        #: As in `protocol.Placed`.
        self.version = 1
        self.last_decision: Decision | None = None
        self.migrations = self.failures = self.experts_migrated = 0
        #: That were told here.
        self.decisions = 0
        self._ask = ask
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Decision]] = {}

    def placed(self, placed: Placed, layout: Layout) -> None:
        """Something has changed.

        Args:
            layout: `placed.layout`.
        """
        self.layout, self.version = layout, placed.version
        before, latest = self.last_decision, placed.last_decision
        if latest is not None and (before is None or before.when != latest.when):
            self.decisions += 1
        self.last_decision = placed.last_decision
        self.migrations, self.failures = placed.migrations, placed.failures
        self.experts_migrated = placed.experts_migrated

    def decided(self, decided: Decided) -> None:
        """The launcher answers a question."""
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
        """Asks the launcher for a decision, and waits for it.

        Args:
            force: move experts whatever it costs.
            dry_run: move none.
            resident: [server][layer], experts that are to live there; None: as the policy finds.

        Raises:
            Unavailable: there is nobody to decide, or the service ends.
        """
        number = next(self._numbers)
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._ask(RebalanceWanted(number, force, dry_run, resident))
            return await future
        finally:
            del self._asked[number]

    def close(self) -> None:
        """Nobody answers any more."""
        for future in self._asked.values():
            if not future.done():
                future.set_exception(Unavailable("the server ends"))
