"""Options from the command line and from a file, and the console script's commands."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

import pytest

from dance_jax import command
from dance_jax.config import EngineOptions, UserError
from dance_jax.launch import __main__ as launch
from dance_jax.launch.cli.options import check_mode, engine_options, parse, rebalance_options


def options(folder: pathlib.Path, text: str, *arguments: str):
    """Options of a --config file with this text, and of more arguments."""
    path = folder / "options.toml"
    path.write_text(text)
    return parse(["--config", str(path), *arguments])


def test_a_file_gives_options_and_the_command_line_overrides_them(tmp_path: pathlib.Path) -> None:
    text = 'hosts = "a.txt"\nmax-num-seqs = 3\nkv_memory = "2MiB"\nrebalance-dry-run = true\n'
    found = options(tmp_path, text + 'half-life = 2.5\nexchange = "calls"\n', "--max-num-seqs", "5")
    assert found.hosts == pathlib.Path("a.txt")
    wanted = EngineOptions(max_num_seqs=5, kv_memory=2 << 20, exchange="calls")
    assert engine_options(found) == wanted
    moving = rebalance_options(found)
    assert (moving.dry_run, moving.half_life_s) == (True, 2.5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prot = 3", "prot: unknown option; the options are hosts, "),
        ("port = 99999", "port: '99999' is not a TCP port"),
        ('exchange = "none"', "exchange: invalid choice"),
        ('trusted-proxies = "10.0.0.5, lb"', "trusted-proxies: 'lb' does not appear to be an IPv4"),
        ("rebalance-dry-run = 1", "rebalance-dry-run: must be true or false"),
        ("hosts = []", "hosts: must be a string or a number"),
        ("max-num-seqs = true", "max-num-seqs: must be a string or a number"),
        ("config = 'x'", "config: unknown option"),
        ("= 3", "cannot be read"),
        ("port = " + "9" * 5000, "cannot be read"),
        ("port = " + "[" * 5000, "cannot be read"),
        ("max_num_seqs = 3\nmax-num-seqs = 4", "max_num_seqs: is also given as max-num-seqs"),
        (r'model = "a\u0000"', "model: must not contain a NUL character"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: pathlib.Path, line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        options(tmp_path, line + "\n", "--hosts", "a.txt")
    assert "options.toml" in str(caught.value) and message in str(caught.value)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: pathlib.Path) -> None:
    assert options(tmp_path, "\ufeffport = 8001\n", "--hosts", "a.txt").port == 8001


@pytest.mark.parametrize("words", (["--hosts", "a", "--conf", "b"], ["--hosts", "a", "--config"]))
def test_the_file_is_never_overlooked(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(words, "dance-jax serve")
    assert "dance-jax serve: error: " in capsys.readouterr().err


def test_a_missing_file_ends_the_launch(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--config", "nowhere.toml"]) == launch.WRONG
    assert "--config nowhere.toml" in capsys.readouterr().err


@pytest.fixture
def streams(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> pytest.CaptureFixture[str]:
    """What a command writes, which replaces the streams of its process."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    return capfd


@pytest.mark.parametrize(
    ("words", "expected", "batch"),
    [
        ("serve --hosts a", ["--hosts", "a"], False),
        ("batch --hosts a --prompts b", ["--hosts", "a", "--prompts", "b"], True),
        ("plan --hosts a", ["--dry-run", "--hosts", "a"], None),
        ("preflight --hosts a", ["--preflight", "--hosts", "a"], None),
    ],
)
def test_commands_are_launches(
    words: str, expected: list[str], batch: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Sequence[str], str, bool | None]] = []
    monkeypatch.setattr(launch, "process", lambda *given: started.append(given))
    command.main(words.split())
    assert started == [(expected, f"dance-jax {words.split()[0]}", batch)]


@pytest.mark.parametrize(
    ("word", "text", "message"),
    [
        ("serve", 'hosts = "a"\nprompts = "b"\n', "does not take --prompts"),
        ("batch", 'hosts = "a"\n', "needs --prompts"),
    ],
)
def test_a_command_heeds_the_prompts_of_the_file(
    word: str, text: str, message: str, tmp_path: pathlib.Path, streams: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "options.toml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        command.main([word, "--config", str(tmp_path / "options.toml")])
    assert ended.value.code == 2 and message in streams.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("batch --hosts a", "needs --prompts"),
        ("serve --hosts a --prompts=b", "does not take --prompts"),
        ("fly", "invalid choice"),
    ],
)
def test_a_wrong_command_is_refused(
    words: str, message: str, streams: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(words.split())
    assert ended.value.code == 2 and message in streams.readouterr().err


def test_a_model_is_converted_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["convert", "--help"])
    assert ended.value.code == 0 and "usage: dance-jax convert" in capsys.readouterr().out


def test_a_plan_is_no_preflight() -> None:
    with pytest.raises(UserError, match=r"--dry-run .* and --preflight"):
        check_mode(parse(["--hosts", "a", "--dry-run", "--preflight"]))
