"""Blocked attention against a plain softmax over all positions that a token sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dance_jax.models.attention import Heads, Rows, attend, write

#: In an entry, the first 6 floats are keys and the last 4 are values.
WIDTH, HEADS = 10, Heads(1, 6, 6, 4)


def oracle(query, known, position, scale, window):
    """float64 [heads, 4]"""
    entries = known[: position + 1]
    entries = entries[-window:] if window else entries
    scores = query[0] @ entries[:, :6].T * scale
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights @ entries[:, -4:] / weights.sum(axis=-1, keepdims=True)


class Sequences:
    """Entries of some sequences, and a cache with their beginnings in scattered blocks.

    The rest of the cache and the rest of the block table have arbitrary content.
    """

    def __init__(self, lengths, block, cached):
        rng = np.random.default_rng(0)
        self.entries = [rng.standard_normal((n, WIDTH)).astype(np.float32) for n in lengths]
        pages = [-(-n // block) for n in lengths]
        self.cache = rng.standard_normal((1 + sum(pages), block, WIDTH)).astype(np.float32)
        order = iter(rng.permutation(1 + sum(pages)).tolist())
        self.table = rng.integers(0, sum(pages), (len(lengths), max(pages))).astype(np.int32)
        for number, (entries, count) in enumerate(zip(self.entries, cached, strict=True)):
            self.table[number, : pages[number]] = [next(order) for _ in range(pages[number])]
            for position in range(count):
                where = self.table[number, position // block], position % block
                self.cache[where] = entries[position]

    def rows(self, starts, owners, firsts, chunk):
        start = np.array(starts, np.int32)
        length = np.array([len(self.entries[owner]) for owner in owners], np.int32) - start
        length, slots = np.clip(length, 0, chunk), np.zeros_like(start)
        return Rows(
            start, length, np.array(firsts, np.int32), self.table[list(owners)], slots, chunk
        )


def run(sequences, batch, owners, window, span):
    """Compare every real token (rows may be padded) with the oracle; returns their number."""
    rng = np.random.default_rng(1)
    tokens = sum(rows.tokens for rows in batch)
    query = rng.standard_normal((tokens, 1, 3, 6)).astype(np.float32)
    positions = np.concatenate([rows.positions_t for rows in batch])
    owner_t = np.concatenate(
        [np.repeat(each, rows.chunk) for each, rows in zip(owners, batch, strict=True)]
    )
    fresh = rng.standard_normal((tokens, WIDTH)).astype(np.float32)  # padding is arbitrary
    real = [p < len(sequences.entries[o]) for p, o in zip(positions, owner_t, strict=True)]
    for t in np.flatnonzero(real):
        fresh[t] = sequences.entries[owner_t[t]][positions[t]]

    @jax.jit
    def attended(batch):
        return attend(
            query,
            batch,
            write(jnp.asarray(sequences.cache), fresh, batch),
            HEADS,
            scale=0.5,
            window=window,
            span=span,
        )

    found = np.asarray(attended(batch))
    for t in np.flatnonzero(real):
        known = sequences.entries[owner_t[t]].astype(np.float64)
        expected = oracle(query[t], known, positions[t], 0.5, window)
        np.testing.assert_allclose(found[t, 0], expected, rtol=0, atol=2e-6)
    return int(np.sum(real))


@pytest.mark.parametrize("window", [None, 1, 5, 17])
@pytest.mark.parametrize("span", [4, 8, 16])
@pytest.mark.parametrize("lengths", [(1, 2, 21, 38), (9, 17, 36, 1), (1, 1, 1, 1)])
def test_decode_rows(lengths, span, window):
    """Only the last token of each sequence is computed; all others are cached."""
    cached = [length - 1 for length in lengths]
    sequences = Sequences(lengths, 4, cached)
    rows = sequences.rows(cached, range(4), range(4), 1)
    assert run(sequences, [rows], [range(4)], window, span) == 4


@pytest.mark.parametrize("window", [None, 1, 5, 17])
@pytest.mark.parametrize("span", [4, 16])
def test_a_slice_beside_a_decode(span, window):
    """Sequence 0 has three rows, 1 has a row after cached blocks, 2 a short row; 3 decodes."""
    sequences = Sequences((11, 24, 2, 19), 4, (0, 20, 0, 18))
    decode = sequences.rows([18, 0], [3, 3], [0, 1], 1)
    starts, owners = [0, 4, 8, 20, 0, 0], [0, 0, 0, 1, 2, 2]
    piece = sequences.rows(starts, owners, [0, 0, 0, 3, 4, 5], 4)
    owners = [[3, 3], owners]
    # The second decode row and the last row of the slice represent unused rows.
    assert run(sequences, [decode, piece], owners, window, span) == 2 + 11 + 4 + 2 + 2


def test_the_loop_follows_the_sequences_not_the_cache():
    # A cache that is 1000 times longer must not be read: the loop's bound is data, not a shape.
    def alone(start, cached):
        one = np.ones((1, 1, 1, 6), np.float32)
        table = np.arange(1000, dtype=np.int32)[None]
        zero = np.zeros(1, np.int32)
        rows = Rows(start, zero + 1, zero, table, zero, 1)
        return attend(one, [rows], cached, Heads(1, 6, 0, 6), 1.0)

    cached = jnp.zeros((1000, 128, 6), jnp.float32)
    text = jax.jit(alone).lower(np.zeros(1, np.int32), cached).as_text()
    assert "stablehlo.while" in text
    wide = [line for line in text.splitlines() if "1000x128" in line and "gather" not in line]
    assert not [line for line in wide if "dot_general" in line or "exponential" in line]
