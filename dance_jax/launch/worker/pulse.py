"""Signs of life of an engine, for the watchdog of its front end (`serve.watchdog`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import ControlConnection, pulse_identity

#: Seconds between two signs of life.
PULSE_S = 1.0
#: A process that uses less than this share of a core does nothing.
BUSY = 0.05


class Pulse:
    """Tells the front end every PULSE_S what the engine does, and for how long it has not moved.

    A thread with a connection of its own sends the messages, so a long step does not delay them.

    Args:
        endpoint, key, rank: of the connection to the front end.
    """

    def __init__(self, endpoint: str, key: bytes, rank: int) -> None:
        #: What the engine does, in a few words.
        self.doing = "starting"
        self._connection = ControlConnection(endpoint, key, pulse_identity(rank))
        self._progress: Callable[[], object] | None = None
        self._clocks: tuple[Callable[[], float], ...] = (time.process_time,)
        threading.Thread(target=self._run, daemon=True, name="pulse").start()

    def watch(self, progress: Callable[[], object], *clocks: Callable[[], float]) -> None:
        """Watch a started engine.

        Args:
            progress: its value changes as the engine makes progress, waiting for peers included.
            clocks: processor seconds of the engine's own work. It works while one of them advances:
                on a busy machine, that of the process without answers to others, whose seconds are
                not those of a processor, may stand still or even go back.
        """
        self._clocks, self._progress = clocks, progress

    def _run(self) -> None:
        moved = worked = looked = time.monotonic()
        last: object = None
        cpu_s: list[float] = []
        while True:
            now = time.monotonic()
            present = None if self._progress is None else self._progress()
            if present is None or present != last:
                moved = now
            spent = [clock() for clock in self._clocks]
            least_s = BUSY * (now - looked)
            if len(spent) != len(cpu_s) or any(
                new - old > least_s for new, old in zip(spent, cpu_s, strict=True)
            ):
                worked = now
            last, cpu_s, looked = present, spent, now
            still_s, stalled_s = now - max(moved, worked), now - moved
            if self._connection.unacknowledged < 2:  # the front end does not read
                pulse = protocol.Pulse(self.doing, still_s, stalled_s)
                self._connection.send(protocol.encode(pulse))
            self._connection.waits(PULSE_S)
