"""Which remote servers a token visits: the one tie rule of the engine and of the metrics.

A token that misses experts visits the fewest servers that hold all of them; among equally
small sets the one with the lowest server numbers ({0, 3} before {1, 2}); an expert that several
visited servers hold runs on the lowest of them. All subsets are weighed up to `EXACT_SERVERS`
servers; above, the server with most of the still missing experts is taken first.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dance_jax.config import UserError

#: Up to this many servers every subset is weighed; above, the choice is greedy.
EXACT_SERVERS = 8
#: A set of servers is a bitmask in a non-negative int32.
MAX_SERVERS = 31


@functools.cache
def subsets(num_servers: int) -> np.ndarray:
    """All sets of servers as int32 bitmasks [2 ** num_servers], in the order of preference.

    Fewest servers first, then lowest server numbers; the empty set comes first.

    >>> subsets(3).tolist()  # {}, 0, 1, 2, 01, 02, 12, 012
    [0, 1, 2, 4, 3, 5, 6, 7]
    """
    if not 1 <= num_servers <= EXACT_SERVERS:
        raise UserError(f"subsets of {num_servers} servers: give 1 to {EXACT_SERVERS}")
    members = [[n for n in range(num_servers) if m >> n & 1] for m in range(2**num_servers)]
    order = sorted(range(2**num_servers), key=lambda m: (len(members[m]), members[m]))
    masks = np.array(order, np.int32)
    masks.flags.writeable = False
    return masks


@functools.cache
def _subsets_with(num_servers: int) -> np.ndarray:
    """For each server, the subsets that it is in, as bits: unsigned [servers, words].

    Bit i of a row (bit i % word size of word i // word size) is set where subsets(n)[i] has it.
    """
    masks = subsets(num_servers)
    size = min(max(masks.size, 8), 32)
    has_ni = (masks[None, :] >> np.arange(num_servers)[:, None]) & 1
    bits_nw = np.zeros((num_servers, max(masks.size, 8)), np.uint64)
    bits_nw[:, : masks.size] = has_ni
    weights = np.uint64(1) << np.arange(size, dtype=np.uint64)
    words = (bits_nw.reshape(num_servers, -1, size) * weights).sum(-1)
    return words.astype(f"uint{size}")


def lowest_server(mask: jax.Array) -> jax.Array:
    """Lowest server number in each bitmask, int32; -1 for the empty set."""
    number = lax.population_count((mask & -mask) - jnp.int32(1))
    return jnp.where(mask == 0, jnp.int32(-1), number)


def _fewest_exact(missing_kt: jax.Array, num_servers: int) -> jax.Array:
    """The preferred smallest set that meets every non-empty mask.

    All sets are weighed at once, each as a bit: a mask is met by those with any of its servers.
    """
    with_nw = _subsets_with(num_servers)
    dtype, word = missing_kt.dtype, with_nw.dtype
    open_t = jnp.ones(missing_kt.shape[1:], bool)
    chosen_t = jnp.zeros(missing_kt.shape[1:], dtype)
    for with_n in with_nw.T:
        meets_kt = jnp.where(missing_kt == 0, ~word.type(0), word.type(0))
        for n in range(num_servers):
            has_kt = (missing_kt & dtype.type(1 << n)) != 0
            meets_kt = meets_kt | jnp.where(has_kt, with_n[n], word.type(0))
        meets_t = jnp.bitwise_and.reduce(meets_kt, axis=0)
        # The lowest bit is the preferred set, unless one of an earlier word met all.
        first_t = jnp.where(open_t, meets_t & (~meets_t + word.type(1)), word.type(0))
        for n in range(num_servers):
            has_t = (first_t & with_n[n]) != 0
            chosen_t = chosen_t | jnp.where(has_t, dtype.type(1 << n), dtype.type(0))
        open_t = open_t & (meets_t == 0)
    return chosen_t


def _fewest_greedy(missing_kt: jax.Array, num_servers: int) -> jax.Array:
    """Servers in the order of how many open masks they are in, lowest number first."""
    dtype = missing_kt.dtype

    def visit_next(_, chosen_t: jax.Array) -> jax.Array:
        open_kt = jnp.where((missing_kt & chosen_t[None]) == 0, missing_kt, dtype.type(0))
        best_t, most_t = jnp.zeros_like(chosen_t), jnp.zeros(chosen_t.shape, jnp.uint8)
        for n in range(num_servers):
            bit = dtype.type(1 << n)
            gain_t = ((open_kt & bit) != 0).sum(axis=0, dtype=jnp.uint8)
            best_t = jnp.where(gain_t > most_t, bit, best_t)
            most_t = jnp.maximum(gain_t, most_t)
        return chosen_t | best_t

    rounds = min(missing_kt.shape[0], num_servers)
    return lax.fori_loop(0, rounds, visit_next, jnp.zeros(missing_kt.shape[1:], dtype))


def fewest_servers(missing_kt: jax.Array, num_servers: int) -> jax.Array:
    """The servers that tokens visit: bitmasks [...], of the same type.

    Args:
        missing_kt: bitmasks [k, ...], who holds each missing expert; 0: not missing.
        num_servers: servers in the cluster, static.
    """
    fewest = _fewest_exact if num_servers <= EXACT_SERVERS else _fewest_greedy
    return fewest(missing_kt, num_servers)


def choose_servers(holders_tk: jax.Array, needed_tk: jax.Array, num_servers: int) -> jax.Array:
    """The remote server that serves each expert a token misses: int32 [t, k].

    Pure and traceable; integer operations on whole arrays, without table look-ups.

    >>> holders = jnp.array([[0b010, 0b110, 0b100], [0b010, 0b110, 0b001]], jnp.int32)
    >>> needed = jnp.array([[True, True, True], [True, True, False]])
    >>> choose_servers(holders, needed, 3).tolist()
    [[1, 1, 2], [1, 1, -1]]

    Args:
        holders_tk: int32 [t, k], bit n set where server n holds the k-th chosen expert.
        needed_tk: bool [t, k], True where the expert must be run elsewhere.
        num_servers: servers in the cluster, static, at most 31.

    Returns:
        Server of each needed expert; -1 where not needed or held by nobody.

    Raises:
        UserError: num_servers is out of range.
    """
    if not 1 <= num_servers <= MAX_SERVERS:
        raise UserError(f"{num_servers} servers: between 1 and {MAX_SERVERS} are supported")
    missing_tk = jnp.where(needed_tk, jnp.asarray(holders_tk, jnp.int32), jnp.int32(0))
    return lowest_server(missing_tk & fewest_servers(missing_tk.T, num_servers)[:, None])


def visited(server_tk: jax.Array) -> jax.Array:
    """Bitmask of the servers each token visits, int32 [t], from choose_servers' result."""
    bit_tk = jnp.where(server_tk < 0, jnp.int32(0), jnp.int32(1) << jnp.maximum(server_tk, 0))
    return jnp.bitwise_or.reduce(bit_tk, axis=1)
