"""Tests of what all benchmark commands share: options, exit codes, signals, verdict."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import signal
from collections.abc import Iterator

import pytest
from rich.console import Console

from benchmarks.arguments import (
    add_folder,
    add_results,
    check_folder,
    check_results,
    count,
    count_or_0,
    list_of,
    some_of,
)
from benchmarks.command import INTERRUPTED, MISSED, WRONG, exit_code, terminal, verdict
from benchmarks.targets import Target
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
        (Failed("gone"), MISSED),
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
    assert capsys.readouterr().err == ("" if code == INTERRUPTED else "error: gone\n")


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


def test_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Target("good", 1.0, 0.5), Target("bad [x]", 1.0, 2.0)
    console = terminal(20)
    assert console.width == 20
    assert verdict(console, [good, bad], check=True) == MISSED
    assert verdict(console, [good, bad], check=False) == 0
    assert verdict(Console(), [good], check=True) == 0
    assert capsys.readouterr().out.splitlines()[:3] == ["Targets", good.line(), bad.line()]
    assert verdict(console, [], check=True) == 0
    assert capsys.readouterr().out == ""


def test_words() -> None:
    assert some_of(("a", "b", "c"))("c,a") == ("a", "c")
    with pytest.raises(argparse.ArgumentTypeError, match="unknown policy 'd'; choose from a, b"):
        some_of(("a", "b"), "policy")("a,d")
    assert list_of(count)("3,1") == [3, 1] and count_or_0("0") == 0
    for parse, text in ((count, "0"), (count_or_0, "-1"), (count, "1" * 5000), (count, "1.0")):
        with pytest.raises(
            argparse.ArgumentTypeError, match=r"not a whole number of at least [01]"
        ):
            parse(text)


def test_results_that_cannot_be_written_are_found_before(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, folder = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_results(files)
    add_folder(folder)
    check_results(files.parse_args([]))
    check_folder(folder.parse_args([]))
    for option in ("--output", "--plot"):
        with pytest.raises(UserError, match=f"{option} .*does not exist"):
            check_results(files.parse_args([option, str(tmp_path / "none" / "file")]))
    check_folder(folder.parse_args(["--output", str(tmp_path / "new" / "folder")]))
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output: .*file cannot be written to"):
        check_folder(folder.parse_args(["--output", str(tmp_path / "file")]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--plot needs matplotlib"):
        check_results(files.parse_args(["--plot", str(tmp_path / "plot.png")]))
    with pytest.raises(UserError, match="--output needs matplotlib"):
        check_folder(folder.parse_args(["--output", str(tmp_path)]))
