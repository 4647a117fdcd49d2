"""Where the expert calls of many tokens go under a placement: what predicted times are made of."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.placement.visit import MAX_SERVERS

#: Tokens of each server in one block.
BLOCK_TOKENS = 64
#: Tokens of all servers in a sample, as long as each server has a block: what bounds the time of
#: an evaluation. Of more tokens some are left out, evenly.
MOST_TOKENS = 16384
#: Bits of a word.
WORD = 32


class Flows(NamedTuple):
    """Per token of the sending server; b blocks, l layers, n and m servers."""

    #: float [b, l, n]: share of its tokens that miss any expert.
    away: Array
    #: float [b, l, n, m]: hidden states to each server; 0 to itself.
    sent: Array
    #: float [b, l, n, m]: expert calls that each server computes, itself too.
    calls: Array


class Sample(NamedTuple):
    """Tokens of all servers; n servers, l layers, b blocks of t tokens each."""

    #: uint32 [n, l, words, b, t]: the experts of each token, a bit for each.
    bits: Array
    #: int32 [n, b * t, l, k]: the same as numbers.
    experts: Array
    #: float32 [n, l, experts]: expert calls per token.
    used: Array
    #: int32 [n, n]: the order in which each server prefers to call the others, itself last.
    order: Array

    @classmethod
    def of(
        cls, routes: Sequence[np.ndarray], experts: int, order: np.ndarray, *, blocks: bool
    ) -> Sample:
        """Deals every server's tokens to blocks in turn, so that neighbours are apart.

        A server with fewer tokens than the others has some of them several times, one without any
        has token 0 with all experts 0, and has to be left out by its weight.

        Args:
            routes: per server int [tokens, layers, k]; not all empty.
            experts: of a layer.
            order: int [n, n], see `visit.preferences`.
            blocks: in blocks of BLOCK_TOKENS, or else all of them in one.
        """
        longest = max(map(len, routes))
        most = max(1, MOST_TOKENS // (BLOCK_TOKENS * len(routes)))
        size = min(-(-longest // BLOCK_TOKENS), most) * BLOCK_TOKENS
        _, layers, k = routes[0].shape
        dealt = np.zeros((len(routes), size, layers, k), np.int32)
        for n, route in enumerate(routes):
            if len(route):
                dealt[n] = route[np.arange(size) * len(route) // size]
        shape = (BLOCK_TOKENS, -1) if blocks else (size, 1)
        bits, used = _prepared(jnp.asarray(dealt), experts, shape)
        return cls(bits, jnp.asarray(dealt), used, jnp.asarray(order, jnp.int32))


@functools.partial(jax.jit, static_argnames=("experts", "shape"))
def _prepared(dealt_ntlk: Array, experts: int, shape: tuple[int, int]) -> tuple[Array, Array]:
    """`Sample.bits` and `used` of tokens that are dealt to blocks in turn: `shape` is [t, b]."""
    servers, size, *_ = dealt_ntlk.shape
    words = jnp.arange(-(-experts // WORD), dtype=jnp.int32)[None, :, None, None]

    def of_layer(_, route_ntk: Array) -> tuple[None, tuple[Array, Array]]:
        word_ntk, place_ntk = jnp.divmod(route_ntk, WORD)
        bit_ntk = jnp.uint32(1) << place_ntk.astype(jnp.uint32)
        in_word = word_ntk[:, None] == words
        # A token's experts differ.
        bits_nwt = jnp.where(in_word, bit_ntk[:, None], jnp.uint32(0)).sum(-1, dtype=jnp.uint32)
        server_n11 = jnp.arange(servers, dtype=jnp.int32)[:, None, None]
        used_ne = jnp.zeros((servers, experts), jnp.float32)
        used_ne = used_ne.at[server_n11, route_ntk].add(jnp.float32(1 / size))
        return None, (bits_nwt, used_ne)

    _, (bits_lnwt, used_lne) = lax.scan(of_layer, None, dealt_ntlk.transpose(2, 0, 1, 3))
    bits = bits_lnwt.reshape(*bits_lnwt.shape[:3], *shape).transpose(1, 0, 2, 4, 3)
    return bits, used_lne.transpose(1, 0, 2)


def packed(held: Array) -> Array:
    """bool [..., experts] as bits: uint32 [..., words]."""
    experts = held.shape[-1]
    words = -(-experts // WORD)
    padded = jnp.pad(held, [(0, 0)] * (held.ndim - 1) + [(0, words * WORD - experts)])
    bits = padded.reshape(*held.shape[:-1], words, WORD).astype(jnp.uint32)
    shift = jnp.arange(WORD, dtype=jnp.uint32).reshape(*[1] * (bits.ndim - 1), WORD)
    return (bits << shift).sum(-1, dtype=jnp.uint32)


def flows(sample: Sample, resident_nle: Array) -> Flows:
    """What the tokens of a sample send under a placement, by the rule of `visit`.

    Args:
        sample: the tokens.
        resident_nle: bool [servers, layers, experts].
    """
    servers, _, _, _, tokens = sample.bits.shape
    k = sample.experts.shape[-1]
    held_nlw = packed(resident_nle)
    # Experts of others, in the order in which each server prefers to call them: [i, n, l, words].
    holds_inlw = held_nlw[sample.order[:, :-1].T]
    missing = sample.bits & ~held_nlw[:, :, :, None, None]
    away_nlb = (missing != 0).any(2).sum(-1, dtype=jnp.int32)
    zero = jnp.zeros((servers - 1, *away_nlb.shape), jnp.uint32)
    sent_inlb, served_inlb = zero, zero
    for _ in range(min(k, servers - 1)):
        missing, visited, served = _visit_next(missing, holds_inlw)
        sent_inlb, served_inlb = sent_inlb + visited, served_inlb + served

    place_nm = jnp.argsort(sample.order, axis=1)

    def per_token(counts_inlb: Array) -> Array:
        """To servers by their numbers: float32 [b, l, n, m]."""
        itself = jnp.zeros((1, *away_nlb.shape), jnp.uint32)
        counts_nilb = jnp.concatenate([counts_inlb, itself]).transpose(1, 0, 2, 3)
        counts_nmlb = jnp.take_along_axis(counts_nilb, place_nm[:, :, None, None], axis=1)
        return counts_nmlb.transpose(3, 2, 0, 1).astype(jnp.float32) / tokens

    away = away_nlb.transpose(2, 1, 0).astype(jnp.float32) / tokens
    served = per_token(served_inlb)
    own = (k - served.sum(-1))[..., None] * jnp.eye(servers, dtype=jnp.float32)[None, None]
    return Flows(away, per_token(sent_inlb), served + own)


def _visit_next(missing: Array, holds_inlw: Array) -> tuple[Array, Array, Array]:
    """Every token visits the server with most of the experts that it misses.

    Among equals it is the one that the token's server prefers.

    Args:
        missing: uint32 [n, l, words, b, t], the experts that tokens miss.
        holds_inlw: uint32, what others hold, in each server's order.

    Returns:
        What is missed then; tokens that visit each server, and experts that it computes for them,
        uint32 [i, n, l, b].
    """
    servers, layers, _, blocks, tokens = missing.shape
    order_i = jnp.arange(len(holds_inlw), dtype=jnp.uint32)
    unroll = min(max(len(holds_inlw), 1), 8)

    def rank(i: Array) -> Array:
        """More than 0, and more the lower a place is."""
        return jnp.uint32(MAX_SERVERS - 1) - i

    def better(best: Array, other: tuple[Array, Array]) -> tuple[Array, None]:
        i, held_nlw = other
        here = missing & held_nlw[..., None, None]
        experts = lax.population_count(here).sum(2, dtype=jnp.uint32)
        key = jnp.where(experts > 0, experts * MAX_SERVERS + rank(i), jnp.uint32(0))
        return jnp.maximum(best, key), None

    nobody = jnp.zeros((servers, layers, blocks, tokens), jnp.uint32)
    best, _ = lax.scan(better, nobody, (order_i, holds_inlw), unroll=unroll)
    chosen = best % MAX_SERVERS

    def visit(missing: Array, other: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        i, held_nlw = other
        visits = chosen == rank(i)
        here = missing & held_nlw[..., None, None]
        served = jnp.where(visits[:, :, None], here, jnp.uint32(0))
        experts = lax.population_count(served).sum((2, 4), dtype=jnp.uint32)
        return missing ^ served, (visits.sum(-1, dtype=jnp.uint32), experts)

    missing, counts = lax.scan(visit, missing, (order_i, holds_inlw), unroll=unroll)
    return missing, *counts
