"""The log of a process: what it cannot take is lost, and errors in a row are logged once."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from dance_jax import logs
from dance_jax.logs import OnceASecond

#: Prints, logs and shows a traceback as a child process does, and reports on descriptor 3.
PROCESS = """
import logging, os, sys, traceback, warnings
from dance_jax import logs
logs.begin()
logging.getLogger("x").error("an error")
print("text" * 10000)
try:
    1 / 0
except ZeroDivisionError:
    traceback.print_exc()
warnings.warn("a warning")
sys.stdout.flush(); sys.stderr.flush()
os.write(0, b"alive")
"""


@pytest.mark.parametrize("log", ["/dev/full", "closed"])
def test_a_log_that_cannot_be_written_stops_nothing(log: str, tmp_path) -> None:
    redirected = ">&- 2>&-" if log == "closed" else f">{log} 2>&1"
    said = tmp_path / "said"
    with said.open("wb") as file:
        command = f'exec "$0" -c "$1" {redirected}'
        ended = subprocess.run(["sh", "-c", command, sys.executable, PROCESS], stdin=file)
    assert ended.returncode == 0
    assert said.read_bytes() == b"alive"


def test_a_log_that_can_be_written_has_everything() -> None:
    ended = subprocess.run([sys.executable, "-c", PROCESS], stdin=2, capture_output=True)
    assert ended.returncode == 0
    assert ended.stdout == b"text" * 10000 + b"\n"
    for text in (b" x ERROR: an error\n", b"ZeroDivisionError", b"UserWarning: a warning"):
        assert text in ended.stderr


def test_an_error_in_a_row_is_logged_once_a_second(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    log = logging.getLogger("tests.once")
    once = OnceASecond()
    log.addFilter(once)
    try:
        for number in range(5):
            log.warning("failed: %d", number)
            log.warning("another: %d", number)
            log.error("failed: %d", number)
        assert [record.getMessage() for record in caplog.records] == [
            "failed: 0",
            "another: 0",
            "failed: 0",
        ]
        caplog.clear()
        now += 1.0
        log.warning("failed: %d", 5)
        log.warning("failed: %d", 6)
        (record,) = caplog.records
        assert record.getMessage() == "failed: 5 (and 4 more since the last such message)"
    finally:
        log.removeFilter(once)


def test_information_is_never_dropped(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("tests.information")
    log.addFilter(OnceASecond())
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            log.info("said")
    assert len(caplog.records) == 3
