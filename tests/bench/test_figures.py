"""Statistics and verdicts for hand-made answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dance_jax.bench.client import Answer, Call
from dance_jax.bench.figures import ALL, Figures, Spread, by_server, gaps_s


def answer(
    *pieces: float, server: int = 0, asked: float = 0.0, tokens: int = 0, error: str | None = None
) -> Answer:
    """An answer whose pieces arrived at these times."""
    count = tokens or len(pieces)
    end = pieces[-1] if pieces else asked
    return Answer(
        Call(server, [1, 2], count),
        asked,
        list(pieces),
        end,
        prompt_tokens=2,
        output_tokens=count,
        finish_reason="length",
        error=error,
    )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_spread(values: list[float]) -> None:
    found = Spread.of(values)
    assert found is not None and found.count == len(values)
    assert min(values) <= found.p50 <= found.p90 <= found.p99 <= max(values)
    assert found.mean == pytest.approx(sum(values) / len(values))


def test_percentiles_are_between_neighbours() -> None:
    assert Spread.of([]) is None
    found = Spread.of(range(101))
    assert found == Spread(50.0, 50.0, 90.0, 99.0, 101)
    between = Spread.of([0.0, 1.0])
    assert between is not None and between.p50 == 0.5
    assert (between.p90, between.p99) == pytest.approx((0.9, 0.99))


def test_figures_count_from_the_moment_a_request_was_to_arrive() -> None:
    answers = [
        answer(1.5, 2.0, 3.0, asked=1.0),
        answer(4.0, asked=2.0),
        answer(9.0, asked=3.0, error="lost"),
    ]
    found = Figures.of("alpha", answers)
    assert (found.requests, found.failed, found.seconds) == (3, 1, 8.0)
    assert (found.prompt_tokens, found.output_tokens) == (4, 4)
    assert (found.output_rate, found.prompt_rate, found.request_rate) == (0.5, 0.5, 0.25)
    assert found.ttft == Spread.of([0.5, 2.0])
    assert found.tpot == Spread.of([0.75])
    assert found.itl == Spread.of([0.5, 1.0])
    assert found.e2e == Spread.of([2.0, 2.0])


def test_tpot_is_over_tokens_not_pieces() -> None:
    assert Figures.of("x", [answer(1.0, 2.0, 5.0, tokens=9)]).tpot == Spread.of([0.5])


def test_servers_and_all() -> None:
    answers = [answer(1.0), answer(2.0, server=1), answer(3.0, server=1)]
    rows = by_server(["alpha", "beta"], answers)
    assert [(row.server, row.requests) for row in rows] == [("alpha", 1), ("beta", 2), (ALL, 3)]
    assert len(by_server(["alpha"], answers[:1])) == 1
    nothing = Figures.of("none", [])
    assert nothing.ttft is None and nothing.output_rate == 0.0


def test_gaps_after_a_moment() -> None:
    assert gaps_s([answer(1.0, 2.0, 4.0), answer(2.5, 3.0)], after_s=2.0) == [2.0, 0.5]
