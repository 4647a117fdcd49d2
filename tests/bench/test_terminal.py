"""How a command ends: exit codes, signals."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from dance_jax.bench.terminal import FAILED, INTERRUPTED, WRONG, exit_code
from dance_jax.config import UserError

ENDING = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Reset the signal handlers, in case nohup ignores SIGHUP; restore them afterwards."""
    before = [signal.signal(number, signal.SIG_DFL) for number in ENDING]
    yield
    for number, handler in zip(ENDING, before, strict=True):
        signal.signal(number, handler)


class Failed(OSError):
    """A failure of the measured program that is an OSError too."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Failed("gone"), FAILED),
        (UserError("gone"), WRONG),
        (PermissionError("gone"), WRONG),
        (KeyboardInterrupt(), INTERRUPTED),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise error

    assert exit_code(work, Failed) == code
    message = "interrupted: " if code == INTERRUPTED else "error: gone\n"
    assert capsys.readouterr().err.startswith(message)


def test_errors_of_the_program_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0, Failed)
    assert exit_code(lambda: 7) == 7


@pytest.mark.parametrize("number", ENDING)
def test_signals_clean_up(number: signal.Signals) -> None:
    ended = []

    def work() -> int:
        try:
            signal.raise_signal(number)
            raise AssertionError("the signal did not end the work")
        finally:
            ended.append(number)

    with pytest.raises(SystemExit, match=str(128 + number)):
        exit_code(work)
    assert ended == [number]


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def work() -> int:
        signal.raise_signal(signal.SIGHUP)
        return 0

    assert exit_code(work) == 0
