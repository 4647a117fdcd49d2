"""Which remote servers a token visits: the one tie rule of the engine and of the metrics.

A token that misses experts visits the fewest servers that hold all of them; among equally
small sets the one with the lowest numbers ({0, 3} before {1, 2}); an expert that several visited
servers hold runs on the lowest of them. All subsets are weighed up to `EXACT_SERVERS` servers;
above, the server with most of the still missing experts is taken first.

Numbers are places in the order in which the calling server prefers to call the others
(`preferences`), so that ties go to the server that answers soonest.

Many sets of servers are masks: unsigned integers [words, ...], a bit for each server. One word of
as few bits as will do is enough for up to 32 servers.
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
#: Of one cluster: what an expert call can name (models/native/calls.h).
MAX_SERVERS = 256
#: Servers of a word.
WORD = 32
#: Seconds that differ by less, relatively, are equal: they are sums in different orders.
EQUAL = 1e-9


def preferences(seconds_nm: np.ndarray) -> np.ndarray:
    """The order in which each server prefers to call the others: int32 [n, n].

    Row n lists all servers: those with the least seconds first, itself last. Of equal ones the next
    in a ring comes first, so that their callers are shared.

    >>> preferences(np.array([[0, 1, 1], [1, 0, 1], [2, 1, 0]])).tolist()
    [[1, 2, 0], [2, 0, 1], [1, 0, 2]]

    Args:
        seconds_nm: float [n, n], of a call from a server (first axis) to a server (second axis).
    """
    number_n = np.arange(len(seconds_nm))
    found = np.zeros(seconds_nm.shape, np.int32)
    for n, seconds_m in enumerate(seconds_nm):
        ascending = np.argsort(seconds_m)
        before, after = seconds_m[ascending[:-1]], seconds_m[ascending[1:]]
        level_m = np.zeros(len(number_n), int)
        level_m[ascending[1:]] = np.cumsum(after > before * (1 + EQUAL))
        found[n] = np.lexsort(((number_n - n) % len(number_n), level_m, number_n == n))
    return found


def places(order_n: np.ndarray) -> np.ndarray:
    """Each server's place in an order: int32 [n].

    >>> places(np.array([2, 0, 1])).tolist()
    [1, 2, 0]

    Raises:
        ValueError: it does not list each server once.
    """
    place_n = np.argsort(order_n).astype(np.int32)
    if not np.array_equal(np.asarray(order_n)[place_n], np.arange(len(order_n))):
        raise ValueError(f"an order of {len(order_n)} servers lists each once, not {order_n}")
    return place_n


def mask_dtype(num_servers: int) -> np.dtype:
    """The type of a mask's words."""
    return np.dtype(np.uint8 if num_servers <= 8 else np.uint16 if num_servers <= 16 else np.uint32)


def masks(resident: np.ndarray, order_n: np.ndarray | None = None) -> np.ndarray:
    """The servers that hold something, as masks [words, ...].

    >>> masks(np.array([[True, False], [True, True]])).tolist()
    [[3, 2]]

    Args:
        resident: bool [servers, ...].
        order_n: int [servers], a caller's order of preference: bit i is server `order_n[i]`, and
            `choose_servers` finds such places. None: bit i is server i.

    Raises:
        UserError: there are more servers than a cluster can have.
    """
    if order_n is not None:
        resident = resident[np.asarray(order_n)]
    num_servers = len(resident)
    if not 1 <= num_servers <= MAX_SERVERS:
        raise UserError(f"{num_servers} servers: between 1 and {MAX_SERVERS} are supported")
    found = np.zeros((-(-num_servers // WORD), *resident.shape[1:]), mask_dtype(num_servers))
    for n, held in enumerate(resident):
        found[n // WORD] |= held.astype(found.dtype) << found.dtype.type(n % WORD)
    return found


def has(masks_w: jax.Array, place: int | jax.Array) -> jax.Array:
    """Whether the server of a place is in each mask: bool [...]."""
    word_w = masks_w[place // WORD]
    return (word_w >> jnp.asarray(place % WORD, word_w.dtype)) & 1 != 0


@functools.cache
def subsets(num_servers: int) -> np.ndarray:
    """All sets of servers as int32 bitmasks [2 ** num_servers], in the order of preference.

    Fewest servers first, then lowest numbers; the empty set comes first.

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


def lowest_server(masks_w: jax.Array) -> jax.Array:
    """Lowest server number in each mask, int32 [...]; -1 for the empty set."""
    nobody = jnp.int32(MAX_SERVERS)
    lowest = nobody
    for word, mask in enumerate(masks_w):
        number = lax.population_count((mask & (~mask + mask.dtype.type(1))) - mask.dtype.type(1))
        first = number.astype(jnp.int32) + jnp.int32(word * WORD)
        lowest = jnp.minimum(lowest, jnp.where(mask == 0, nobody, first))
    return jnp.where(lowest == nobody, jnp.int32(-1), lowest)


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


def _fewest_greedy(missing_wkt: jax.Array, num_servers: int) -> jax.Array:
    """Servers in the order of how many open masks they are in, lowest number first."""
    dtype, words = missing_wkt.dtype, len(missing_wkt)
    word_w = jnp.arange(words, dtype=jnp.uint8)

    def best_of(best, word):
        """Of the servers of one word and of those before it: word, bit, and masks it is in."""
        (best_word_t, best_bit_t, most_t), (number, open_kt) = best, word
        for place in range(min(num_servers, WORD)):
            bit = dtype.type(1 << place)
            gain_t = ((open_kt & bit) != 0).sum(axis=0, dtype=jnp.uint8)
            best_word_t = jnp.where(gain_t > most_t, number, best_word_t)
            best_bit_t = jnp.where(gain_t > most_t, bit, best_bit_t)
            most_t = jnp.maximum(gain_t, most_t)
        return (best_word_t, best_bit_t, most_t), None

    def visit_next(_, chosen_wt: jax.Array) -> jax.Array:
        met_kt = ((missing_wkt & chosen_wt[:, None]) != 0).any(axis=0)
        open_wkt = jnp.where(met_kt[None], dtype.type(0), missing_wkt)
        none_t = jnp.zeros(chosen_wt.shape[1:], jnp.uint8)
        start = (none_t, none_t.astype(dtype), none_t)
        (best_word_t, best_bit_t, _), _ = lax.scan(best_of, start, (word_w, open_wkt))
        here_wt = best_word_t[None] == word_w.reshape(-1, *[1] * none_t.ndim)
        return chosen_wt | jnp.where(here_wt, best_bit_t[None], dtype.type(0))

    rounds = min(missing_wkt.shape[1], num_servers)
    nobody_wt = jnp.zeros((words, *missing_wkt.shape[2:]), dtype)
    return lax.fori_loop(0, rounds, visit_next, nobody_wt)


def fewest_servers(missing_wkt: jax.Array, num_servers: int) -> jax.Array:
    """The servers that tokens visit: masks [words, ...].

    Args:
        missing_wkt: masks [words, k, ...], who holds each missing expert; empty: not missing.
        num_servers: servers in the cluster, static.
    """
    if num_servers <= EXACT_SERVERS:
        return _fewest_exact(missing_wkt[0], num_servers)[None]
    return _fewest_greedy(missing_wkt, num_servers)


def choose_servers(holders_wtk: jax.Array, needed_tk: jax.Array, num_servers: int) -> jax.Array:
    """The place of the remote server that serves each expert a token misses: int32 [t, k].

    Pure and traceable; integer operations on whole arrays, without table look-ups.

    >>> holders = jnp.array([[[0b010, 0b110, 0b100], [0b010, 0b110, 0b001]]], jnp.uint8)
    >>> needed = jnp.array([[True, True, True], [True, True, False]])
    >>> choose_servers(holders, needed, 3).tolist()
    [[1, 1, 2], [1, 1, -1]]

    Args:
        holders_wtk: masks [words, t, k] of the servers that hold each chosen expert.
        needed_tk: bool [t, k], True where the expert must be run elsewhere.
        num_servers: servers in the cluster, static.

    Returns:
        Each needed expert's server, by its bit in the masks; -1 where not needed or held by nobody.
    """
    missing_wtk = jnp.where(needed_tk[None], holders_wtk, holders_wtk.dtype.type(0))
    chosen_wt = fewest_servers(missing_wtk.transpose(0, 2, 1), num_servers)
    return lowest_server(missing_wtk & chosen_wt[:, :, None])
