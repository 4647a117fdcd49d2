"""Tests of what all benchmark commands share: options and verdict."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib

import pytest
from rich.console import Console

from benchmarks.arguments import (
    add_folder,
    add_results,
    check_folder,
    check_results,
    list_of,
    some_of,
)
from benchmarks.command import verdict
from benchmarks.targets import Target
from dance_jax.bench.arguments import count
from dance_jax.bench.terminal import FAILED, terminal
from dance_jax.config import UserError


def test_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Target("good", 1.0, 0.5), Target("bad [x]", 1.0, 2.0)
    console = terminal(20)
    assert console.width == 20
    assert verdict(console, [good, bad], check=True) == FAILED
    assert verdict(console, [good, bad], check=False) == 0
    assert verdict(Console(), [good], check=True) == 0
    assert capsys.readouterr().out.splitlines()[:3] == ["Targets", good.line(), bad.line()]
    assert verdict(console, [], check=True) == 0
    assert capsys.readouterr().out == ""


def test_words() -> None:
    assert some_of(("a", "b", "c"))("c,a") == ("a", "c")
    with pytest.raises(argparse.ArgumentTypeError, match="unknown policy 'd'; choose from a, b"):
        some_of(("a", "b"), "policy")("a,d")
    assert list_of(count)("3,1") == [3, 1]


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
