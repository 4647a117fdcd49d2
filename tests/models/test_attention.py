"""Blocked attention against a plain softmax over everything a token sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dance_jax.models.attention import Cached, attend


def oracle(query, cached, fresh, start, scale, window):
    """float64; keys are the first 6 floats of an entry, values the last 4."""
    result = np.zeros((*query.shape[:-1], 4))
    for r, c in np.ndindex(*query.shape[:2]):
        entries = np.concatenate([cached[r, : start[r]], fresh[r, : c + 1]])
        entries = entries[-window:] if window else entries
        scores = query[r, c, 0] @ entries[:, :6].T * scale
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        result[r, c, 0] = weights @ entries[:, -4:] / weights.sum(axis=-1, keepdims=True)
    return result


@pytest.mark.parametrize("window", [None, 1, 5, 17])
@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("slot", [None, (2, 0, 4, 1)])
def test_attend(chunk, window, slot):
    rng = np.random.default_rng(0)
    # 37 positions in blocks of 8: the last block overlaps the one before
    query = rng.standard_normal((4, chunk, 1, 3, 6)).astype(np.float32)
    entries = rng.standard_normal((5, 37, 10)).astype(np.float32)
    if slot is None:
        entries = entries[:4]
    where = Cached(jnp.asarray(entries), None if slot is None else jnp.array(slot))
    cached = entries if slot is None else entries[list(slot)]
    fresh = rng.standard_normal((4, chunk, 10)).astype(np.float32)
    starts = [[0, 1, 20, 37], [0, 0, 0, 0], [8, 16, 35, 0], [36, 36, 36, 36]]

    @jax.jit
    def run(start):
        return attend(
            query,
            where,
            fresh,
            start,
            lambda entries: (entries[:, :, None, :6], entries[:, :, None, -4:]),
            scale=0.5,
            window=window,
            block=8,
        )

    for start in starts:
        found = run(np.array(start, np.int32))
        expected = oracle(query, cached, fresh, start, 0.5, window)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_the_loop_follows_the_sequences_not_the_cache():
    # a cache 1000 times as long must not be read: the loop's bound is data, not shape
    def run(start, cached):
        one = np.ones((1, 1, 1, 1, 6), np.float32)
        fresh = np.ones((1, 1, 6), np.float32)
        split = lambda entries: (entries[:, :, None], entries[:, :, None])  # noqa: E731
        return attend(one, Cached(cached), fresh, start, split, 1.0)

    cached = np.zeros((1, 128 * 1000, 6), np.float32)
    text = jax.jit(run).lower(np.zeros(1, np.int32), cached).as_text()
    assert "stablehlo.while" in text
    wide = [line for line in text.splitlines() if "128000" in line and "dynamic_slice" not in line]
    assert not [line for line in wide if "dot_general" in line or "exponential" in line]
