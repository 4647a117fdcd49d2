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
def _missing_words(num_servers: int) -> np.ndarray:
    """For each holders mask h, the subsets that contain no holder, as bits: uint32 [2 ** n, words].

    Bit i of row h (word i // 32, bit i % 32) is set where subsets(n)[i] & h == 0.
    """
    masks = subsets(num_servers)
    misses = (np.arange(masks.size)[:, None] & masks[None, :]) == 0
    words = -(-masks.size // 32)
    bits = np.zeros((masks.size, words * 32), np.uint64)
    bits[:, : masks.size] = misses
    weights = np.uint64(1) << np.arange(32, dtype=np.uint64)
    return (bits.reshape(masks.size, words, 32) * weights).sum(-1).astype(np.uint32)


def lowest_server(mask: jax.Array) -> jax.Array:
    """Lowest server number in each bitmask, int32; -1 for the empty set."""
    number = lax.population_count((mask & -mask) - jnp.int32(1))
    return jnp.where(mask == 0, jnp.int32(-1), number)


def _fewest_exact(missing_tk: jax.Array, num_servers: int) -> jax.Array:
    """The preferred smallest set that meets every non-empty mask of a row: int32 [t]."""
    # Row 0 of the table has all bits set; a mask of 0 must exclude nothing instead.
    words_tkw = jnp.asarray(_missing_words(num_servers))[missing_tk]
    words_tkw = jnp.where((missing_tk == 0)[..., None], jnp.uint32(0), words_tkw)
    free_tw = ~jnp.bitwise_or.reduce(words_tkw, axis=1)
    word_t = jnp.argmax(free_tw != 0, axis=1).astype(jnp.int32)
    free_t = jnp.take_along_axis(free_tw, word_t[:, None], axis=1)[:, 0]
    lowest_t = free_t & (~free_t + jnp.uint32(1))
    bit_t = lax.population_count(lowest_t - jnp.uint32(1)).astype(jnp.int32)
    return jnp.asarray(subsets(num_servers))[word_t * jnp.int32(32) + bit_t]


def _fewest_greedy(missing_tk: jax.Array, num_servers: int) -> jax.Array:
    """Servers in the order of how many open masks they are in, lowest number first: int32 [t]."""
    server_n = jnp.arange(num_servers, dtype=jnp.int32)

    def visit_next(_, chosen_t: jax.Array) -> jax.Array:
        open_tk = jnp.where((missing_tk & chosen_t[:, None]) == 0, missing_tk, jnp.int32(0))
        gain_tn = ((open_tk[:, :, None] >> server_n[None, None, :]) & jnp.int32(1)).sum(
            axis=1, dtype=jnp.int32
        )
        best_t = jnp.argmax(gain_tn, axis=1).astype(jnp.int32)
        return chosen_t | jnp.where(gain_tn.max(axis=1) > 0, jnp.int32(1) << best_t, jnp.int32(0))

    rounds = min(missing_tk.shape[1], num_servers)
    return lax.fori_loop(0, rounds, visit_next, jnp.zeros(missing_tk.shape[0], jnp.int32))


def choose_servers(holders_tk: jax.Array, needed_tk: jax.Array, num_servers: int) -> jax.Array:
    """The remote server that serves each expert a token misses: int32 [t, k].

    Pure and traceable; up to 8 servers t x k table look-ups and a few int32 operations.

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
    fewest = _fewest_exact if num_servers <= EXACT_SERVERS else _fewest_greedy
    return lowest_server(missing_tk & fewest(missing_tk, num_servers)[:, None])


def visited(server_tk: jax.Array) -> jax.Array:
    """Bitmask of the servers each token visits, int32 [t], from choose_servers' result."""
    bit_tk = jnp.where(server_tk < 0, jnp.int32(0), jnp.int32(1) << jnp.maximum(server_tk, 0))
    return jnp.bitwise_or.reduce(bit_tk, axis=1)
