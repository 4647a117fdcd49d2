"""Where the answers of a batch are kept, however the batch ends."""

from __future__ import annotations

import json
import pathlib

import pytest

from dance_jax.config import UserError
from dance_jax.engine.sequence import OutputDelta, Request, RequestOutput, SamplingParams
from dance_jax.launch.cli.answers import AnswerFile
from dance_jax.launch.cli.prompts import Prompt


def add(file: AnswerFile, index: int) -> None:
    prompt = Prompt(index, f"{index} \u00fc\u2028", rank=1, max_tokens=3)
    output = RequestOutput.of(Request(str(index), prompt.text, [1], SamplingParams()))
    output.add(OutputDelta(str(index), 0, text="x", token_ids=[7], finish_reason="stop"))
    file.add(prompt, output)


def indices(path: pathlib.Path) -> list[int]:
    return [json.loads(line)["index"] for line in path.read_text().split("\n")[:-1]]


def test_answers_are_kept_as_they_end_and_ordered_at_the_end(tmp_path: pathlib.Path) -> None:
    path, partial = tmp_path / "out", tmp_path / "out.partial"
    with AnswerFile(path, ["a", "b"], pytest.fail) as file:
        for index in (2, 0):
            add(file, index)
        assert indices(partial) == [2, 0]
        add(file, 1)
        assert not path.exists()
        file.write()
    assert indices(path) == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_a_batch_that_ends_early_keeps_its_answers(tmp_path: pathlib.Path) -> None:
    said: list[str] = []
    with pytest.raises(RuntimeError), AnswerFile(tmp_path / "out", ["a", "b"], said.append) as file:
        add(file, 5)
        raise RuntimeError
    assert indices(tmp_path / "out.partial") == [5]
    assert said == [f"complete answers: 1, in {tmp_path / 'out.partial'}"]


def test_a_batch_goes_on_when_the_disk_is_full(tmp_path: pathlib.Path) -> None:
    (tmp_path / "out.partial").symlink_to("/dev/full")
    said: list[str] = []
    with AnswerFile(tmp_path / "out", ["a", "b"], said.append) as file:
        add(file, 0)
        add(file, 1)
        file.write()
    assert indices(tmp_path / "out") == [0, 1]
    assert len(said) == 1 and "No space left" in said[0]


def test_a_device_gets_the_answers_at_the_end() -> None:
    with AnswerFile(pathlib.Path("/dev/null"), ["a", "b"], pytest.fail) as file:
        add(file, 0)
        file.write()
    assert not pathlib.Path("/dev/null.partial").exists()


def test_a_partial_file_that_cannot_be_written_is_said_before_the_run(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(UserError, match=r"--output: .*out\.partial cannot be written"):
        AnswerFile(tmp_path / "out", [], pytest.fail)
