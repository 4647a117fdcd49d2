"""Tests of benchmarks/systems: loads that are the same for all systems, ratios, and targets."""

from __future__ import annotations

import json
import pathlib

import pytest

from benchmarks.families import SHAPES
from benchmarks.programs.gguf_file import token_name
from benchmarks.programs.models import write_word_tokenizer
from benchmarks.systems.loads import Figures, Load, output, own_tokens
from benchmarks.systems.results import Cell, agreement, targets
from benchmarks.systems.running import _parts
from benchmarks.targets import Target
from dance_jax.bench.client import Answer, Call
from dance_jax.models.tokenizer import Tokenizer


def figures(decode: float | None, outputs: list[list[int]] | None = None) -> Figures:
    return Figures(decode, 10.0, 0.5, 0.01, 1e4, outputs or [])


def test_users_of_a_host_have_tokens_of_their_own() -> None:
    calls = Load("four", 4, prompt=50, tokens=3).calls(3, 302, seed=1)
    assert [call.server for call in calls] == [0, 1, 2, 0]
    assert calls[0].prompt != calls[3].prompt
    for call in calls:
        assert set(call.prompt) <= set(own_tokens(call.server, 3, 302))
        assert (len(call.prompt), call.max_tokens) == (50, 3)
    ranges = [own_tokens(host, 3, 302) for host in range(3)]
    assert [list(found) for found in ranges] == [
        list(range(2, 102)),
        list(range(102, 202)),
        list(range(202, 302)),
    ]
    assert calls == Load("four", 4, prompt=50, tokens=3).calls(3, 302, seed=1)
    assert calls != Load("four", 4, prompt=50, tokens=3).calls(3, 302, seed=2)


def test_tokens_are_read_from_their_names(tmp_path: pathlib.Path) -> None:
    write_word_tokenizer(tmp_path, 300)
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["olmoe"] | {"vocab_size": 300}))
    tokenizer = Tokenizer.load(tmp_path)
    tokens = [12, 7, 299]
    assert tokenizer.encode(" ".join(map(token_name, tokens))) == tokens
    answer = Answer(Call(0, [2], 4), 0.0, text=tokenizer.decode([12, 1, 7, 299]))
    assert output(answer) == tokens
    # llama.cpp puts no spaces between tokens, and omits special ones.
    assert output(Answer(Call(0, [2], 4), 0.0, text="<12><7><299>")) == tokens


def test_the_star_has_the_output_where_most_layers_are() -> None:
    assert _parts([1, 1, 2]) == [2, 2, 5]


def test_a_ratio_is_of_the_same_repetition() -> None:
    ours = [figures(10), figures(90), figures(40)]
    cell = Cell("float32", 100_000_000, "1 user", {"latency": ours, "star": [figures(20)] * 3})
    assert cell.ratio("latency", "star", cell.speed) == 2.0
    assert cell.ratio("latency", "old", cell.speed) is None
    more = Cell("float32", 100_000_000, "3 users", {"latency": ours, "star": [figures(20)] * 3})
    assert more.ratio("latency", "star", more.speed) == 1.0


def test_targets_are_of_the_rate_and_load() -> None:
    both = {"latency": [figures(10)], "star": [figures(20)]}
    found = list(targets([Cell("int8", 100_000_000, "1 user", both)]))
    assert [(each.limit, each.worst, each.missed) for each in found] == [
        (0.6, 0.5, True),
        (2.0, 1.0, False),
    ]
    assert not list(targets([Cell("int8", 30_000_000, "1 user", both)]))


def test_equal_outputs_are_counted_in_float32() -> None:
    runs = {"latency": [figures(1, [[1], [2]])], "star": [figures(1, [[1], [3]])]}
    cells = [Cell("float32", None, "3 users", runs), Cell("int8", None, "3 users", runs)]
    assert agreement(cells) == {"star": (1, 2)}


@pytest.mark.parametrize(
    ("worst", "least", "missed"),
    [(2.0, False, True), (0.5, False, False), (2.0, True, False), (0.5, True, True)],
)
def test_a_target_is_a_least_or_a_most(worst: float, least: bool, missed: bool) -> None:
    target = Target("speed", 1.0, worst, least=least)
    assert target.missed is missed
    assert ("at least 1" if least else "at most 1") in target.line()
