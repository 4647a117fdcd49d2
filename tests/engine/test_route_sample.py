"""A bounded sample in which every token is as likely."""

from __future__ import annotations

import numpy as np

from dance_jax.engine.route_sample import RouteSample


def routes(tokens: range) -> np.ndarray:
    """[t, 1, 1], each token's route is its number."""
    return np.array(tokens).reshape(-1, 1, 1)


def test_few_tokens_are_all_kept_in_order():
    sample = RouteSample(10, (1, 1))
    sample.add(routes(range(4)))
    sample.add(routes(range(4, 7)))
    assert sample.kept.ravel().tolist() == list(range(7))


def test_many_tokens_are_sampled_evenly():
    hits = np.zeros(100)
    for seed in range(400):
        sample = RouteSample(10, (1, 1), seed)
        for start in range(0, 100, 7):
            sample.add(routes(range(start, min(start + 7, 100))))
        kept = sample.kept.ravel()
        assert len(set(kept.tolist())) == 10
        hits[kept] += 1
    # 40 expected, standard deviation 6: no token is favoured by its place.
    assert hits.min() > 15 and hits.max() < 65
    assert abs(hits[:50].sum() - 2000) < 200


def test_a_sample_of_nothing_is_not_wanted():
    assert not RouteSample(0, (2, 3)).wanted
