"""A hung engine is noticed, and a busy or waiting one is left alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import ControlListener, new_key, pulse_identity
from dance_jax.launch.worker import pulse as pulses
from dance_jax.launch.worker.pulse import Pulse
from dance_jax.serve.watchdog import Watchdog

LIMIT_S = 10.0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that sleeps."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        time.sleep(0.5)
        yield process
        process.kill()


def watched(watchdog: Watchdog, clock: Clock, seconds: int, pulse: protocol.Pulse | None) -> str:
    """The verdict after some seconds with a sign of life, or without any, in each."""
    for _ in range(seconds):
        clock.now += 1.0
        if pulse is not None:
            watchdog.heard(pulse)
        if why := watchdog.verdict():
            return why
    return ""


def test_a_silent_engine_that_does_nothing_is_hung(process: subprocess.Popen[bytes]) -> None:
    clock = Clock()
    watchdog = Watchdog(LIMIT_S, process.pid, clock)
    assert watched(watchdog, clock, 5, protocol.Pulse("in step 7", 0.0, 0.0)) == ""
    process.send_signal(signal.SIGSTOP)
    assert watched(watchdog, clock, 9, None) == ""
    assert watched(watchdog, clock, 3, None) == "gave no sign of life for 11 s; it was in step 7"


def test_a_pause_of_the_front_end_is_no_silence_of_the_engine(
    process: subprocess.Popen[bytes],
) -> None:
    clock = Clock()
    watchdog = Watchdog(LIMIT_S, process.pid, clock)
    clock.now += 60
    assert watchdog.verdict() == ""
    assert watched(watchdog, clock, 9, None) == ""


@pytest.mark.parametrize(
    ("pulse", "hung"),
    [
        (protocol.Pulse("in step 7", 2.0, 30.0), False),  # a long layer
        (protocol.Pulse("in step 7", 2.0, 101.0), True),  # an endless loop
        (protocol.Pulse("in step 7", 11.0, 11.0), True),  # a deadlock
    ],
)
def test_an_engine_without_progress_is_hung(pulse: protocol.Pulse, hung: bool) -> None:
    clock = Clock()
    why = watched(Watchdog(LIMIT_S, 1, clock), clock, 3, pulse)
    expected = f"made no progress for {pulse.stalled_s:.0f} s; it was in step 7" if hung else ""
    assert why == expected


def test_signs_of_life_tell_progress_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulses, "PULSE_S", 0.05)
    key, identity = new_key(), pulse_identity(3)
    listener = ControlListener(key, [identity])
    steps = [0]
    pulse = Pulse(listener.private, key, 3)

    def next_one() -> protocol.Pulse:
        for _ in range(200):
            for _, content in listener.receive(0.1):
                found = protocol.decode_event(content)
                assert isinstance(found, protocol.Pulse)
                return found
        raise AssertionError("no sign of life")

    pulse.doing = "compiling"
    while next_one().doing != "compiling":
        pass
    assert next_one().stalled_s == 0.0, "an engine that starts is not watched"
    pulse.watch(lambda: steps[0], lambda: 0.0)
    while (found := next_one()).stalled_s < 0.2:
        pass
    assert found.still_s == found.stalled_s
    while next_one().stalled_s > 0.1:
        steps[0] += 1
    # On a busy machine, answers to others take more seconds than the process has of its cores.
    pulse.watch(lambda: 0, lambda: -time.monotonic(), time.monotonic)
    while (found := next_one()).stalled_s < 0.2:
        pass
    assert found.still_s < 0.1, "its stepping thread works"
    listener.close()
