"""Task files are read and dealt to servers."""

from __future__ import annotations

import itertools
import json
import pathlib

import numpy as np
import pytest

from benchmarks.serve import DEMO_TASKS
from benchmarks.serving.task_files import read_texts, task_files
from dance_jax.config import UserError
from dance_jax.models.directory import demo_dir
from dance_jax.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(demo_dir())


def test_task_files_are_dealt_to_servers(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    for name in "abc":
        lines = [json.dumps({"task": name, "prompt": f"{name} {n}"}) for n in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("\n\n".join(lines) + "\n")
    rng = np.random.default_rng(0)

    def found(servers: int) -> list[set[str]]:
        texts = read_texts(task_files(tmp_path), servers, tokenizer)
        drawn = ([texts.whole(n, rng) for _ in range(60)] for n in range(servers))
        return [{tokenizer.decode(tokens) for tokens in own} for own in drawn]

    both = [{f"{name} {n}" for n in range(2)} for name in "abc"]
    assert found(2) == [both[0] | both[2], both[1]]
    assert found(4) == [*both, both[0]]


@pytest.mark.parametrize("line", ["no JSON", '{"text": "x"}', '{"prompt": 5}'])
def test_wrong_task_files_are_told(line: str, tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"no \*\.jsonl"):
        task_files(tmp_path)
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        read_texts([path], 1, tokenizer)
    path.write_text("\n")
    with pytest.raises(UserError, match="no prompts"):
        read_texts([path], 1, tokenizer)


def test_the_demo_s_tasks_are_there(tokenizer: Tokenizer) -> None:
    texts = read_texts(DEMO_TASKS, 3, tokenizer)
    rng = np.random.default_rng(0)
    assert all(len(texts.cut(server, 1500, rng)) == 1500 for server in range(3))
    starts = {tuple(texts.cut(server, 3, rng)) for server, _ in itertools.product(range(3), "ab")}
    assert len(starts) == 6
