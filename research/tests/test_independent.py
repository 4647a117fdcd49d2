"""Tests of research/apart.py: where sections can run, and their figures from answers."""

from __future__ import annotations

import pytest

from dance_jax.bench.client import Answer, Call
from dance_jax.config import UserError
from research import apart
from research.independent.hosts import Beside, Bytes, Many
from research.independent.loopback import Failure, Processor
from research.independent.streams import longest_gap, same


def answer(server: int, text: str, *pieces: float) -> Answer:
    return Answer(Call(server, [2], 3), 0.0, list(pieces), text=text)


def test_a_gap_is_also_before_the_first_token() -> None:
    quick, late = answer(0, "a", 0.1, 0.2, 0.25), answer(0, "a", 0.7, 0.8)
    assert longest_gap([quick]) == pytest.approx(0.1)
    assert longest_gap([quick, late]) == pytest.approx(0.7)


def test_answers_are_compared_by_server() -> None:
    answers = [answer(0, "a", 0.1), answer(1, "a", 0.1), answer(1, "b", 0.1)]
    assert same(answers, {0: "a", 1: "b"}) == (2, 3)


def test_ratios_are_of_pairs() -> None:
    assert Processor([2.0, 4.0, 1.0], [1.0, 1.0, 1.0], [9.0] * 3).ratio == 0.5
    assert Many([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]).ratio == 1.0
    found = Beside({"a": [1.0, 2.0], "b": [1.0, 1.0]}, {"a": [1.0, 4.0], "b": [2.0, 2.0]})
    assert found.ratios == {"a": 1.5, "b": 2.0}
    (target,) = found.targets()
    assert (target.worst, target.where, target.missed) == (2.0, "b", True)


def test_what_is_missed() -> None:
    stopped = list(Failure("stopped", [0.2, 0.7], [8.0, 8.0], 3, 4).targets())
    assert [target.worst for target in stopped] == [0.7, 1.0]
    assert all(target.missed for target in stopped)
    (changed,) = Failure("killed", [5.0], [9.0], 4, 4).targets()
    assert not changed.missed
    assert [target.missed for target in Bytes((12.0, 10.0), (12.0, 10.0)).targets()] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], ("processor", "stopped", "killed")),
        (["--links", "20Mbps"], ("beside", "bytes")),
        (["--links", "20Mbps", "--sections", "many"], ("many",)),
        (["--sections", "killed,processor"], ("processor", "killed")),
        (["--sections", "beside"], None),
        (["--links", "20Mbps", "--sections", "stopped"], None),
        (["--links", "20Mbps", "--sections", "bytes,many"], None),
    ],
)
def test_sections_run_where_they_can(words: list[str], found: tuple[str, ...] | None) -> None:
    options = apart.parser().parse_args(words)
    if found is None:
        with pytest.raises(UserError, match="can run"):
            apart.check(options)
    else:
        assert apart.check(options) == found
