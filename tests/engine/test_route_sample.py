"""A bounded sample in which all tokens are equally likely, or fade."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.engine.route_sample import RouteSample


def routes(tokens: range) -> np.ndarray:
    """[t, 1, 1]: each token's route is its number."""
    return np.array(tokens).reshape(-1, 1, 1)


def test_few_tokens_are_all_kept_in_order():
    sample = RouteSample(10, (1, 1))
    sample.add(routes(range(4)))
    sample.add(routes(range(4, 7)))
    assert sample.kept.ravel().tolist() == list(range(7))


def test_tokens_of_a_request_are_neighbours():
    """Tokens of a request are adjacent, however requests alternate."""
    sample = RouteSample(40, (1, 1))
    for start in range(0, 60, 3):
        sample.add(routes(range(start, start + 3)), request=start // 3 % 4)
    requests = sample.kept.ravel() // 3 % 4
    assert len(requests) == 40 and requests.tolist() == sorted(requests.tolist())


def test_many_tokens_are_sampled_evenly():
    hits = np.zeros(100)
    for seed in range(400):
        sample = RouteSample(10, (1, 1), seed)
        for start in range(0, 100, 7):
            sample.add(routes(range(start, min(start + 7, 100))))
        kept = sample.kept.ravel()
        assert len(set(kept.tolist())) == 10
        hits[kept] += 1
    # 40 expected, standard deviation 6: no token is favoured by its position.
    assert hits.min() > 15 and hits.max() < 65
    assert abs(hits[:50].sum() - 2000) < 200


def test_a_sample_of_nothing_is_not_wanted():
    assert not RouteSample(0, (2, 3)).wanted


@pytest.mark.parametrize("half_life", [None, 5.0])
def test_chances_halve_with_every_half_life(half_life: float | None) -> None:
    """Eight half-lives of 5 s, each with the same number of tokens."""
    hits, samples = np.zeros(8), 600
    for seed in range(samples):
        sample = RouteSample(20, (1, 1), seed, half_life)
        for period in range(8):
            # All tokens of a period get the same time, so its probability is known exactly.
            sample.add(routes(range(period * 1000, (period + 1) * 1000)), now=5.0 * period)
        hits += np.bincount(sample.kept.ravel() // 1000, minlength=8)
    weight = np.ones(8) if half_life is None else 2.0 ** np.arange(8)
    want = samples * 20 * weight / weight.sum()
    # With 7 degrees of freedom, chi2 exceeds 24.3 once in a thousand.
    assert ((hits - want) ** 2 / want).sum() < 24.3


def test_choosing_first_is_the_same_as_adding() -> None:
    one, two = (RouteSample(16, (1, 1), seed=3, half_life=2.0) for _ in range(2))
    fetched = 0
    for step in range(400):
        offered = routes(range(step * 4, step * 4 + 4))
        one.add(offered, now=step / 100)
        chosen = two.choose(4, now=step / 100)
        fetched += len(chosen.tokens) > 0
        if len(chosen.tokens):
            two.put(chosen, offered[chosen.tokens])
    assert one.kept.tolist() == two.kept.tolist()
    # The routes of most steps are never read.
    assert 4 <= fetched < 200


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    size=st.integers(0, 12),
    offers=st.lists(st.integers(0, 20), max_size=8),
    half_life=st.sampled_from([None, 0.01, 100.0]),
    seed=st.integers(0, 100),
)
def test_bounds_and_determinism(
    size: int, offers: list[int], half_life: float | None, seed: int
) -> None:
    kept = []
    for _ in range(2):
        sample, total = RouteSample(size, (1, 1), seed, half_life), 0
        for now, tokens in enumerate(offers):
            sample.add(routes(range(total, total + tokens)), now=float(now))
            total += tokens
            # The latest tokens have not faded yet.
            assert min(size, tokens) <= len(sample.kept) <= min(size, total)
            assert half_life is not None or len(sample.kept) == min(size, total)
            assert len(set(sample.kept.ravel().tolist())) == len(sample.kept)
        assert sample.kept.dtype == np.int16 and (sample.kept < max(total, 1)).all()
        kept.append(sample.kept.tolist())
    assert kept[0] == kept[1]


def test_after_many_half_lives_only_the_new_are_left() -> None:
    sample = RouteSample(10, (1, 1), half_life=1.0)
    sample.add(routes(range(100)), now=0.0)
    # A clock that has run for years must not overflow.
    sample.add(routes(range(100, 110)), now=1e8)
    assert sorted(sample.kept.ravel().tolist()) == list(range(100, 110))


def test_few_tokens_fade_too() -> None:
    """Even with room for all tokens, only a share of each period's 2000 tokens remains."""
    sample = RouteSample(16000, (1, 1), seed=1, half_life=5.0)
    for period in range(8):
        sample.add(routes(range(period * 2000, (period + 1) * 2000)), now=5.0 * period)
    left = np.bincount(sample.kept.ravel() // 2000, minlength=8)
    share = 0.5 ** np.arange(7, -1, -1)
    assert left[7] == 2000
    assert (np.abs(left - 2000 * share) <= 4 * np.sqrt(2000 * share * (1 - share))).all()


def test_a_cleared_sample_is_as_new() -> None:
    sample = RouteSample(4, (1, 1))
    sample.add(np.full((9, 1, 1), 1))
    sample.clear()
    assert len(sample.kept) == 0
    sample.add(np.full((9, 1, 1), 2))
    assert sample.kept.ravel().tolist() == [2] * 4
