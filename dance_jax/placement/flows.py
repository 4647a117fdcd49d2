"""Where the expert calls of many tokens go under a placement: the input of predicted times."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.placement.visit import MAX_SERVERS, WORD

#: Tokens of each server in one block.
BLOCK_TOKENS = 64
#: Tokens of all servers in a sample at most (before `_coarse`); longer routes are thinned evenly.
MOST_TOKENS = 1 << 14
#: Following visits takes most of the time, and needs fewer tokens. Tokens of each server whose
#: visits are followed: as many as keep the words that `flows` reads below FOLLOWING_WORK, within
#: these limits.
LEAST_FOLLOWED, MOST_FOLLOWED, FOLLOWING_WORK = 16, 1024, 1.5e6


class Flows(NamedTuple):
    """What a token of server n sends and calls; b blocks, l layers, n and m servers."""

    #: float [b or 1, l, n]: share of tokens that miss any expert; 1: of all blocks together.
    away: Array
    #: float [b, l, n, m]: hidden states sent from n to m; 0 from a server to itself.
    sent: Array
    #: float [b, l, n, m]: expert calls of n that m computes, m = n included.
    calls: Array


class Sample(NamedTuple):
    """Sampled tokens of all servers; n servers, l layers, b blocks of t tokens each."""

    #: int32 [n, tokens, l, k]: the experts of each token.
    experts: Array
    #: uint32 [n, l, words, tokens]: the same as bit masks.
    bits: Array
    #: uint32 [n, l, words, b, t]: masks of the tokens whose visits are followed.
    followed: Array
    #: float32 [n, l, experts]: expert calls per token.
    used: Array
    #: int32 [n, n]: the order in which each server prefers to call the others, itself last.
    order: Array

    @classmethod
    def of(
        cls, routes: Sequence[np.ndarray], experts: int, order: np.ndarray, *, blocks: bool
    ) -> Sample:
        """Samples equally many tokens of every server; deals the followed ones to blocks in turn.

        A server with few tokens appears with some of them several times. A server without tokens
        appears with expert 0 alone: give it the weight 0.

        Args:
            routes: per server int [tokens, layers, k]; not all empty.
            experts: number of experts of a layer.
            order: int [n, n], see `visit.preferences`.
            blocks: deal to blocks of BLOCK_TOKENS tokens; otherwise there is one block.
        """
        servers, (_, layers, k) = len(routes), routes[0].shape
        size = _coarse(min(max(map(len, routes)), max(MOST_TOKENS // servers, 1)))
        words = servers * layers * -(-experts // WORD)
        most = FOLLOWING_WORK // (words * _looks(servers, k))
        followed = int(np.clip(most, LEAST_FOLLOWED, MOST_FOLLOWED))
        followed = min(_coarse(followed), size)
        shape = (1, followed)
        if blocks:
            shape = (-(-followed // BLOCK_TOKENS), BLOCK_TOKENS)
        all_tokens, some = (
            np.stack([_evenly(route, count) for route in routes])
            for count in (size, shape[0] * shape[1])
        )
        bits, used = _as_bits(jnp.asarray(all_tokens), experts)
        followed_bits, _ = _as_bits(jnp.asarray(some), experts)
        in_blocks = followed_bits.reshape(*followed_bits.shape[:3], *shape[::-1]).swapaxes(3, 4)
        return cls(jnp.asarray(all_tokens), bits, in_blocks, used, jnp.asarray(order, jnp.int32))


def _coarse(count: int) -> int:
    """Rounds up to three significant bits, so that few sizes are compiled.

    >>> _coarse(7), _coarse(9), _coarse(1000)
    (7, 10, 1024)
    """
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step


def _evenly(route: np.ndarray, count: int) -> np.ndarray:
    """`count` evenly spaced tokens of a route: int32 [count, l, k]; zeros if it has no tokens."""
    if not len(route):
        return np.zeros((count, *route.shape[1:]), np.int32)
    return route[np.arange(count) * len(route) // count].astype(np.int32)


@functools.partial(jax.jit, static_argnames="experts")
def _as_bits(experts_ntlk: Array, experts: int) -> tuple[Array, Array]:
    """`Sample.bits` and `Sample.used` of tokens."""
    servers, tokens, *_ = experts_ntlk.shape
    words = jnp.arange(-(-experts // WORD), dtype=jnp.int32)[None, :, None, None]
    server_n11 = jnp.arange(servers, dtype=jnp.int32)[:, None, None]

    def of_layer(_, route_ntk: Array) -> tuple[None, tuple[Array, Array]]:
        word_ntk, place_ntk = jnp.divmod(route_ntk, WORD)
        bit_ntk = jnp.uint32(1) << place_ntk.astype(jnp.uint32)
        # A token's experts differ, except in servers without tokens.
        of_word = jnp.where(word_ntk[:, None] == words, bit_ntk[:, None], jnp.uint32(0))
        used_ne = jnp.zeros((servers, experts), jnp.float32)
        used_ne = used_ne.at[server_n11, route_ntk].add(jnp.float32(1 / tokens))
        return None, (jnp.bitwise_or.reduce(of_word, axis=-1), used_ne)

    _, (bits_lnwt, used_lne) = lax.scan(of_layer, None, experts_ntlk.transpose(2, 0, 1, 3))
    return bits_lnwt.transpose(1, 0, 2, 3), used_lne.transpose(1, 0, 2)


def _looks(servers: int, k: int) -> int:
    """How often `flows` reads each word of the tokens that are followed."""
    return max((servers - 1) * min(k, servers - 1), 1)


def work(sample: Sample) -> float:
    """The number of words that `flows` reads."""
    servers, k = len(sample.order), sample.experts.shape[-1]
    return sample.bits.size + sample.followed.size * _looks(servers, k)


def packed(held: Array) -> Array:
    """Packs bool [..., experts] into bit masks: uint32 [..., words]."""
    experts = held.shape[-1]
    words = -(-experts // WORD)
    padded = jnp.pad(held, [(0, 0)] * (held.ndim - 1) + [(0, words * WORD - experts)])
    bits = padded.reshape(*held.shape[:-1], words, WORD).astype(jnp.uint32)
    shift = jnp.arange(WORD, dtype=jnp.uint32).reshape(*[1] * (bits.ndim - 1), WORD)
    return (bits << shift).sum(-1, dtype=jnp.uint32)


def flows(sample: Sample, resident_nle: Array) -> Flows:
    """What the tokens of a sample send and call under a placement, by the rule of `visit`.

    Args:
        sample: the tokens.
        resident_nle: bool [servers, layers, experts].
    """
    servers, *_, tokens = sample.followed.shape
    k = sample.experts.shape[-1]
    held_nlw = packed(resident_nle)
    away_nlt = (sample.bits & ~held_nlw[..., None] != 0).any(2)
    away_ln = away_nlt.mean(-1, dtype=jnp.float32).T
    # What the i-th choice of each server n holds: [i, n, l, words].
    holds_inlw = held_nlw[sample.order[:, :-1].T]
    missing = sample.followed & ~held_nlw[..., None, None]
    shape = (servers, held_nlw.shape[1], missing.shape[3])
    nobody_inlb = jnp.zeros((servers - 1, *shape), jnp.uint32)

    def visit(_, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        missing, sent_inlb, served_inlb = state
        missing, visited, served = _visit_next(missing, holds_inlw)
        return missing, sent_inlb + visited, served_inlb + served

    # Not unrolled: XLA would compute `missing` again for each of its uses.
    rounds, start = min(k, servers - 1), (missing, nobody_inlb, nobody_inlb)
    _, sent_inlb, served_inlb = lax.fori_loop(0, rounds, visit, start)

    place_nm = jnp.argsort(sample.order, axis=1)

    def per_token(counts_inlb: Array) -> Array:
        """Counts by place to shares by server number: float32 [b, l, n, m]."""
        itself = jnp.zeros((1, *shape), jnp.uint32)
        counts_nilb = jnp.concatenate([counts_inlb, itself]).transpose(1, 0, 2, 3)
        counts_nmlb = jnp.take_along_axis(counts_nilb, place_nm[:, :, None, None], axis=1)
        return counts_nmlb.transpose(3, 2, 0, 1).astype(jnp.float32) / tokens

    served = per_token(served_inlb)
    own = (k - served.sum(-1))[..., None] * jnp.eye(servers, dtype=jnp.float32)[None, None]
    return Flows(away_ln[None], per_token(sent_inlb), served + own)


def _visit_next(missing: Array, holds_inlw: Array) -> tuple[Array, Array, Array]:
    """Sends every token to the server that holds most of the experts that it misses.

    Among equals that is the server that the token's own server prefers.

    Args:
        missing: uint32 [n, l, words, b, t], the experts that tokens miss.
        holds_inlw: uint32, what the other servers hold, in each server's order of preference.

    Returns:
        What is still missing; the tokens that visit each server, and the experts that it computes
        for them, uint32 [i, n, l, b] both.
    """
    servers, layers, _, blocks, tokens = missing.shape
    order_i = jnp.arange(len(holds_inlw), dtype=jnp.uint32)
    unroll = min(max(len(holds_inlw), 1), 8)

    def rank(i: Array) -> Array:
        """The tie-breaker of a place: the lower the place, the larger; never 0."""
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

    def with_its(bits: Array, other: tuple[Array, Array]) -> tuple[Array, None]:
        i, held_nlw = other
        held = held_nlw[..., None, None]
        return jnp.where((chosen == rank(i))[:, :, None], held, bits), None

    its, _ = lax.scan(with_its, jnp.zeros_like(missing), (order_i, holds_inlw), unroll=unroll)
    served = lax.population_count(missing & its).sum(2, dtype=jnp.uint32)
    chosen, served = lax.optimization_barrier((chosen, served))

    def count(_, i: Array) -> tuple[None, tuple[Array, Array]]:
        visits = chosen == rank(i)
        experts = jnp.where(visits, served, jnp.uint32(0)).sum(-1, dtype=jnp.uint32)
        return None, (visits.sum(-1, dtype=jnp.uint32), experts)

    _, (visited_inlb, served_inlb) = lax.scan(count, None, order_i, unroll=unroll)
    return missing & ~its, visited_inlb, served_inlb
