"""Prompt files and result files."""

from __future__ import annotations

import pathlib

import pytest

from dance_jax.config import UserError
from dance_jax.launch.cli.prompts import check_writable, read_prompts, same_file
from dance_jax.launch.planning.hosts import parse_hosts

SPEC = parse_hosts("\n".join(f"{name} address=localhost experts=1" for name in "abc"))


def written(tmp_path: pathlib.Path, *lines: str) -> pathlib.Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_defaults_and_turns(tmp_path: pathlib.Path) -> None:
    path = written(
        tmp_path,
        '{"prompt": "one"}',
        '{"prompt": "two", "server": "c", "max_tokens": 3, "temperature": 0.5}',
        "",
        '{"prompt": "three \u2028 and a half"}',
        '{"prompt": "four", "temperature": 1}',
        '{"prompt": ""}',
    )
    prompts = read_prompts(path, SPEC, max_tokens=9)
    assert [prompt.index for prompt in prompts] == [0, 1, 2, 3, 4]
    assert [prompt.rank for prompt in prompts] == [0, 2, 1, 2, 0]
    assert [prompt.max_tokens for prompt in prompts] == [9, 3, 9, 9, 9]
    assert [prompt.temperature for prompt in prompts] == [0.0, 0.5, 0.0, 1.0, 0.0]
    assert prompts[2].text == "three \u2028 and a half"


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ('{"prompt": "x"', "not JSON"),
        ('["prompt"]', "an object"),
        ("{}", "prompt: missing"),
        ('{"prompt": 3}', "prompt: must be a string"),
        ('{"prompt": "\\ud800"}', "prompt: contains half"),
        ('{"prompt": "x", "prompt": "y"}', "prompt: given twice"),
        ('{"prompt": "x", "sever": "a"}', "sever: unknown key"),
        ('{"prompt": "x", "server": "d"}', "server: 'd' is unknown; the servers are a, b, c"),
        ('{"prompt": "x", "server": 0}', "server: 0 is unknown; the servers are"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens: "),
        ('{"prompt": "x", "max_tokens": true}', "max_tokens: "),
        ('{"prompt": "x", "max_tokens": 1.5}', "max_tokens: "),
        ('{"prompt": "x", "temperature": -1}', "temperature: "),
        ('{"prompt": "x", "temperature": NaN}', "temperature: "),
        ('{"prompt": "x", "temperature": "0"}', "temperature: "),
        ('{"prompt": "x", "max_tokens": 2147483648}', "max_tokens: "),
        (f'{{"prompt": "x", "temperature": {"9" * 400}}}', "temperature: "),
        (f'{{"prompt": "x", "temperature": {"9" * 5000}}}', "too long"),
        ("[" * 100_000, "nested"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path: pathlib.Path, line: str, where: str) -> None:
    path = written(tmp_path, '{"prompt": "good"}', "", line)
    with pytest.raises(UserError) as caught:
        read_prompts(path, SPEC, 9)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert where in str(caught.value)


def test_missing_and_empty_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "none", SPEC, 9)
    with pytest.raises(UserError, match="no prompt"):
        read_prompts(written(tmp_path, " "), SPEC, 9)


def test_places_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    check_writable(tmp_path / "out", "--output")
    with pytest.raises(UserError, match=r"--output .* is a directory"):
        check_writable(tmp_path, "--output")
    with pytest.raises(UserError, match=r"the folder .* does not exist"):
        check_writable(tmp_path / "none" / "out", "--output")


def test_devices_take_any_number_of_results(tmp_path: pathlib.Path) -> None:
    null = pathlib.Path("/dev/null")
    check_writable(null, "--output")
    assert not same_file(null, null)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert same_file(tmp_path / "link", tmp_path / "file")
