"""Figures and verdicts of the sections, for hand-made answers."""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np
import pytest

from benchmarks.serving import long, prefix, report, soak, static
from benchmarks.serving.agreement import Difference, first_difference, margin
from benchmarks.serving.gates import Batch
from benchmarks.serving.memory import Sample, unevenness
from benchmarks.serving.prefix import Pair, Prefix
from benchmarks.serving.report import Results
from benchmarks.serving.soak import shortfall
from benchmarks.serving.static import Saturated, Static, saturated_until, sustained, token_rate
from dance_jax.bench.client import Token
from dance_jax.bench.figures import Figures, Spread
from tests.bench.test_figures import answer


def test_saturation_ends_when_a_server_has_nobody_waiting() -> None:
    answers = [
        answer(1.0, 2.0, 3.0, 4.0),
        answer(2.0, 6.0, tokens=4),
        answer(5.0, 6.0, server=1),
        answer(9.0, server=1, error="lost"),
    ]
    assert saturated_until(answers) == 2.0
    assert token_rate(answers, 2.0) == (2 + 2) / 2.0
    assert token_rate([], saturated_until([])) == 0.0


def test_a_rate_is_sustained_if_nobody_is_left_behind_at_its_end() -> None:
    early, late, left = Batch(3.0, 8, 5), Batch(10.5, 8, 0), Batch(10.5, 8, 1)
    assert sustained([early, late], 10.0)
    assert not sustained([early, left, Batch(20.0, 1, 0)], 10.0)
    assert sustained([early], 10.0)


TOKENS = [Token("a", -0.1, {"a": -0.1, "b": -0.5}), Token("b", -0.2, {"b": -0.2, "c": -0.2005})]


def test_first_differences_and_their_margins() -> None:
    assert first_difference(TOKENS, TOKENS) is None
    other = Token("c", -0.2, {"c": -0.2, "b": -0.2009})
    found = first_difference(TOKENS, [TOKENS[0], other, *TOKENS])
    assert found is not None and found.index == 1 and found.margin == pytest.approx(0.0009)
    assert first_difference(TOKENS[:1], TOKENS) == Difference(1, math.inf)
    assert margin(Token("a", -1.0, {"a": -1.0})) == math.inf
    assert margin(Token("c", -3.0, {"a": -1.0, "b": -1.5, "c": -3.0})) == 0.5


def test_memory_is_looked_at_after_the_first_quarter() -> None:
    sizes = [50, 100, 104, 102, 80]
    samples = [Sample(done, size) for done, size in zip((0, 25, 50, 100, 10), sizes, strict=True)]
    assert unevenness(samples, 100) == pytest.approx(0.04)
    assert unevenness(samples[:1], 100) is None


def test_what_a_good_request_may_fall_short_of() -> None:
    whole = answer(1.0, 2.0)
    whole.tokens = list(TOKENS)
    assert shortfall(whole) is None
    whole.finish_reason = "stop"
    assert "ended with stop" in str(shortfall(whole))
    assert "instead of 2" in str(shortfall(answer(1.0, 2.0)))
    assert shortfall(answer(error="lost")) == "lost"
    gone = answer(1.0)
    gone.hung_up = True
    assert shortfall(gone) is None


def static_of(slow: float, fast: float, ttft: tuple[float, float], failed: list[str]) -> Static:
    """Results with these output tokens per second and p99 TTFTs, for batches and for ours."""
    batches, ours = (Figures.of(str(n), [answer(each)]) for n, each in enumerate(ttft))
    rates = Saturated(slow, 1.0), Saturated(fast, 1.0)
    return Static(*rates, 2.0, 0.9, batches, ours, [], [], failed)


def verdicts(results: Results) -> list[bool]:
    """Whether each measured target was missed."""
    return [target.missed for target in results.targets() if target.worst is not None]


def test_targets_of_static() -> None:
    assert verdicts(Results()) == []
    reached = static_of(100.0, 200.0, (3.0, 1.0), [])
    assert verdicts(Results(static=reached)) == [False] * 4
    missed = static_of(100.0, 199.0, (2.9, 1.0), ["lost"])
    assert verdicts(Results(static=missed)) == [True, True, False, True]
    none = Static(Saturated(1.0, 1.0), Saturated(1.0, 1.0), 2.0, None, None, None, [], [], [])
    assert verdicts(Results(static=none)) == [True, True, False]


def test_targets_of_long_and_prefix() -> None:
    itl = Spread(0.0, 1.0, 1.0, 2.9, 5)
    rows = [long.Row("alpha", busy, itl, None, None, []) for busy in (False, True)]
    assert verdicts(Results(long=rows)) == [False, False]
    worse = long.Row("beta", True, Spread(0.0, 1.0, 1.0, 3.1, 5), None, None, ["lost"])
    assert verdicts(Results(long=[*rows, worse])) == [True, True]
    assert verdicts(Results(long=[long.Row("beta", True, None, None, None, [])])) == [True, False]
    pairs = [Pair("alpha", 1.0, share) for share in (0.1, 0.25, 0.9)]
    assert verdicts(Results(prefix=Prefix(pairs, []))) == [False, False]
    assert verdicts(Results(prefix=Prefix(pairs[1:], []))) == [True, False]
    assert verdicts(Results(prefix=Prefix([], ["lost"]))) == [True, True]


def soak_of(**changed: object) -> soak.Soak:
    fields: dict[str, object] = {
        **dict(requests=9, hung_up=1, wrong={}, failed=[], taken=[], compared=7, differences=[]),
        **dict(samples=[], growth=0.05, left_over=[], figures=Figures.of("soak", [])),
    }
    return soak.Soak(**(fields | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({}, None),
        ({"failed": ["lost"]}, 0),
        ({"taken": ["no JSON: HTTP 500"]}, 1),
        ({"differences": [Difference(3, 9e-4)]}, None),
        ({"differences": [Difference(3, 9e-4), Difference(0, 2e-3)]}, 2),
        ({"growth": 0.051}, 3),
        ({"left_over": ["alpha: num_requests_running 1.0"]}, 4),
    ],
)
def test_targets_of_soak(changed: dict[str, object], place: int | None) -> None:
    found = verdicts(Results(soak=soak_of(**changed)))
    assert found == [number == place for number in range(5)]


def test_json_has_figures_targets_and_no_infinity(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.json"
    results = Results(
        load=[Figures.of("alpha", [answer(1.0)])],
        static=static_of(100.0, 200.0, (3.0, 1.0), []),
        soak=soak_of(differences=[Difference(3, math.inf)], samples=[Sample(1, 5)]),
    )
    report.write(path, {"seed": 0}, results)
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found["setup"] == {"seed": 0} and found["machine"]["cores"] >= 1
    assert found["load"][0]["ttft"]["p99"] == 1.0 and found["load"][0]["output_rate"] == 1.0
    assert found["soak"]["differences"] == [{"index": 3, "margin": "inf"}]
    assert found["soak"]["samples"] == [{"done": 1, "resident": 5}]
    missed = [target["name"] for target in found["targets"] if target["missed"]]
    assert missed == ["soak: margin at a first difference"]
    assert not np.isnan(found["static"]["saturated_ours"]["token_rate"])


def test_sections_are_those_that_have_targets() -> None:
    names = {target.name.partition(":")[0] for target in Results().targets()}
    assert names == set(report.SECTIONS)
    assert all(target.worst is None for target in [*prefix.targets(None), *static.targets(None)])
