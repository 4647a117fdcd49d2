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
#: Most tokens of all servers in a sample; of more some are left out, evenly.
MOST_TOKENS = 1 << 14
#: Fewest and most tokens of a server whose visits are followed, and between these the work of it in
#: words of bits that `flows` looks at. It takes most of the time, and fewer tokens say enough.
LEAST_FOLLOWED, MOST_FOLLOWED, FOLLOWING_WORK = 16, 1024, 1.5e6
#: Bits of a word.
WORD = 32


class Flows(NamedTuple):
    """Per token of the sending server; b blocks, l layers, n and m servers."""

    #: float [b or 1, l, n]: share of its tokens that miss any expert; 1: of all blocks together.
    away: Array
    #: float [b, l, n, m]: hidden states to each server; 0 to itself.
    sent: Array
    #: float [b, l, n, m]: expert calls that each server computes, itself too.
    calls: Array


class Sample(NamedTuple):
    """Tokens of all servers; n servers, l layers, b blocks of t tokens each."""

    #: int32 [n, tokens, l, k]: the experts of each token.
    experts: Array
    #: uint32 [n, l, words, tokens]: the same, a bit for each.
    bits: Array
    #: uint32 [n, l, words, b, t]: of those tokens whose visits are followed.
    followed: Array
    #: float32 [n, l, experts]: expert calls per token.
    used: Array
    #: int32 [n, n]: the order in which each server prefers to call the others, itself last.
    order: Array

    @classmethod
    def of(
        cls, routes: Sequence[np.ndarray], experts: int, order: np.ndarray, *, blocks: bool
    ) -> Sample:
        """Takes tokens of every server, and puts those that are followed into blocks in turn.

        A server with fewer tokens than the others has some of them several times, one without any
        has token 0 with all experts 0, and has to be left out by its weight.

        Args:
            routes: per server int [tokens, layers, k]; not all empty.
            experts: of a layer.
            order: int [n, n], see `visit.preferences`.
            blocks: in blocks of BLOCK_TOKENS, or else all of them in one.
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
    """The next number of at most three bits and zeros, so that few sizes are compiled for.

    >>> _coarse(7), _coarse(9), _coarse(1000)
    (7, 10, 1024)
    """
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step


def _evenly(route: np.ndarray, count: int) -> np.ndarray:
    """So many of a route's tokens: int32 [count, l, k]; zeros where there are none."""
    if not len(route):
        return np.zeros((count, *route.shape[1:]), np.int32)
    return route[np.arange(count) * len(route) // count].astype(np.int32)


@functools.partial(jax.jit, static_argnames="experts")
def _as_bits(experts_ntlk: Array, experts: int) -> tuple[Array, Array]:
    """`Sample.bits` and `used` of tokens."""
    servers, tokens, *_ = experts_ntlk.shape
    words = jnp.arange(-(-experts // WORD), dtype=jnp.int32)[None, :, None, None]
    server_n11 = jnp.arange(servers, dtype=jnp.int32)[:, None, None]

    def of_layer(_, route_ntk: Array) -> tuple[None, tuple[Array, Array]]:
        word_ntk, place_ntk = jnp.divmod(route_ntk, WORD)
        bit_ntk = jnp.uint32(1) << place_ntk.astype(jnp.uint32)
        # A token's experts differ, but for those of servers without tokens.
        of_word = jnp.where(word_ntk[:, None] == words, bit_ntk[:, None], jnp.uint32(0))
        used_ne = jnp.zeros((servers, experts), jnp.float32)
        used_ne = used_ne.at[server_n11, route_ntk].add(jnp.float32(1 / tokens))
        return None, (jnp.bitwise_or.reduce(of_word, axis=-1), used_ne)

    _, (bits_lnwt, used_lne) = lax.scan(of_layer, None, experts_ntlk.transpose(2, 0, 1, 3))
    return bits_lnwt.transpose(1, 0, 2, 3), used_lne.transpose(1, 0, 2)


def _looks(servers: int, k: int) -> int:
    """How often `flows` looks at each word of tokens that are followed."""
    return max((servers - 1) * min(k, servers - 1), 1)


def work(sample: Sample) -> float:
    """Words that `flows` looks at."""
    servers, k = len(sample.order), sample.experts.shape[-1]
    return sample.bits.size + sample.followed.size * _looks(servers, k)


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
    servers, *_, tokens = sample.followed.shape
    k = sample.experts.shape[-1]
    held_nlw = packed(resident_nle)
    away_nlt = (sample.bits & ~held_nlw[..., None] != 0).any(2)
    away_ln = away_nlt.mean(-1, dtype=jnp.float32).T
    # Experts of others, in the order in which each server prefers to call them: [i, n, l, words].
    holds_inlw = held_nlw[sample.order[:, :-1].T]
    missing = sample.followed & ~held_nlw[..., None, None]
    shape = (servers, held_nlw.shape[1], missing.shape[3])
    nobody_inlb = jnp.zeros((servers - 1, *shape), jnp.uint32)

    def visit(_, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        missing, sent_inlb, served_inlb = state
        missing, visited, served = _visit_next(missing, holds_inlw)
        return missing, sent_inlb + visited, served_inlb + served

    # A loop, though short: unrolled, XLA computes what is missed anew in all that it is used for.
    rounds, start = min(k, servers - 1), (missing, nobody_inlb, nobody_inlb)
    _, sent_inlb, served_inlb = lax.fori_loop(0, rounds, visit, start)

    place_nm = jnp.argsort(sample.order, axis=1)

    def per_token(counts_inlb: Array) -> Array:
        """To servers by their numbers: float32 [b, l, n, m]."""
        itself = jnp.zeros((1, *shape), jnp.uint32)
        counts_nilb = jnp.concatenate([counts_inlb, itself]).transpose(1, 0, 2, 3)
        counts_nmlb = jnp.take_along_axis(counts_nilb, place_nm[:, :, None, None], axis=1)
        return counts_nmlb.transpose(3, 2, 0, 1).astype(jnp.float32) / tokens

    served = per_token(served_inlb)
    own = (k - served.sum(-1))[..., None] * jnp.eye(servers, dtype=jnp.float32)[None, None]
    return Flows(away_ln[None], per_token(sent_inlb), served + own)


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
