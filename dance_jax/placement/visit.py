"""Which remote servers a token visits: the rule that engine, metrics and `flows` share.

A token that misses experts visits the server that holds most of them, which computes all that it
holds; then the server that holds most of the rest; and so on. Ties go to the lowest place in the
order in which the calling server prefers to call the others (`preferences`): to the server that is
predicted to answer soonest. On the routes of gpt-oss-20b and 3 to 8 servers this makes at most
0.2 % more visits than the minimum (measured).

Sets of servers are bit masks: unsigned integers [words, ...] with one bit for each server. Up to 32
servers fit one word, of 8, 16 or 32 bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dance_jax.config import UserError

#: Most servers of a cluster: as many as an expert call can name (models/native/calls.h).
MAX_SERVERS = 256
#: Most bits of a word of a mask.
WORD = 32
#: Seconds that differ by less than this share count as equal, because measured seconds are noisy.
EQUAL = 0.05


def preferences(seconds_nm: np.ndarray) -> np.ndarray:
    """The order in which each server prefers to call the others: int32 [n, n].

    Row n lists all servers, those with the least seconds first and server n last. Servers that
    count as equal follow in a ring from n on, so that they share their callers.

    >>> preferences(np.array([[0, 1, 1], [1, 0, 1], [2, 1, 0]])).tolist()
    [[1, 2, 0], [2, 0, 1], [1, 0, 2]]

    Args:
        seconds_nm: float [n, n], of a call from server n to server m; the diagonal is ignored.
    """
    found = np.zeros(seconds_nm.shape, np.int32)
    for n, seconds_m in enumerate(seconds_nm):
        others_i = np.roll(np.arange(len(seconds_m)), -n)[1:]
        ascending_i = np.argsort(seconds_m[others_i])
        sorted_i = seconds_m[others_i[ascending_i]]
        level_i = np.zeros(len(others_i), int)
        level_i[ascending_i[1:]] = np.cumsum(sorted_i[1:] > sorted_i[:-1] * (1 + EQUAL))
        found[n] = [*others_i[np.argsort(level_i, kind="stable")], n]
    return found


def places(order_n: np.ndarray) -> np.ndarray:
    """Each server's place in an order: int32 [n].

    >>> places(np.array([2, 0, 1])).tolist()
    [1, 2, 0]

    Raises:
        ValueError: the order does not list each server once.
    """
    place_n = np.argsort(order_n).astype(np.int32)
    if not np.array_equal(np.asarray(order_n)[place_n], np.arange(len(order_n))):
        raise ValueError(f"an order of {len(order_n)} servers lists each once, not {order_n}")
    return place_n


def mask_dtype(num_servers: int) -> np.dtype:
    """The dtype of a mask's words."""
    return np.dtype(np.uint8 if num_servers <= 8 else np.uint16 if num_servers <= 16 else np.uint32)


def masks(resident: np.ndarray, order_n: np.ndarray | None = None) -> np.ndarray:
    """The servers that hold each element, as masks [words, ...].

    >>> masks(np.array([[True, False], [True, True]])).tolist()
    [[3, 2]]

    Args:
        resident: bool [servers, ...].
        order_n: int [servers], a caller's order of preference: bit i is server `order_n[i]`, and
            `choose_servers` returns such places. None: bit i is server i.

    Raises:
        UserError: there is no server, or more than MAX_SERVERS.
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
    """Whether the server at a place is in each mask: bool [...]."""
    word_w = masks_w[place // WORD]
    return (word_w >> jnp.asarray(place % WORD, word_w.dtype)) & 1 != 0


def choose_servers(holders_wtk: jax.Array, needed_tk: jax.Array, num_servers: int) -> jax.Array:
    """The place of the remote server that serves each expert that a token misses: int32 [t, k].

    Pure and traceable: integer operations on whole arrays, no table look-ups.

    >>> holders = jnp.array([[[0b010, 0b110, 0b100], [0b010, 0b110, 0b001]]], jnp.uint8)
    >>> needed = jnp.array([[True, True, True], [True, True, False]])
    >>> choose_servers(holders, needed, 3).tolist()
    [[1, 1, 2], [1, 1, -1]]

    Args:
        holders_wtk: masks [words, t, k] of the servers that hold each chosen expert.
        needed_tk: bool [t, k], True where the expert must run on another server.
        num_servers: number of servers in the cluster, static.

    Returns:
        The server of each needed expert, by its bit in the masks; -1 if it is not needed or no
        server holds it.
    """
    words, tokens, k = holders_wtk.shape
    dtype = holders_wtk.dtype
    word_w = jnp.arange(words, dtype=jnp.int32)
    open_wtk = jnp.where(needed_tk[None], holders_wtk, dtype.type(0))

    def most_of(best_t: jax.Array, word: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        """The best server of this word and the words before, as experts x MAX_SERVERS + rank."""
        number, open_tk = word
        for place in range(min(num_servers, WORD)):
            held_t = ((open_tk & dtype.type(1 << place)) != 0).sum(axis=1, dtype=jnp.int32)
            rank = jnp.int32(MAX_SERVERS - 1 - place) - number * WORD
            best_t = jnp.maximum(best_t, jnp.where(held_t > 0, held_t * MAX_SERVERS + rank, 0))
        return best_t, None

    def visit_next(_, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        open_wtk, chosen_tk = state
        best_t, _ = lax.scan(most_of, jnp.zeros(tokens, jnp.int32), (word_w, open_wtk))
        place_t = jnp.int32(MAX_SERVERS - 1) - best_t % MAX_SERVERS
        bit_t = jnp.left_shift(dtype.type(1), (place_t % WORD).astype(dtype))
        here_wt = (place_t // WORD)[None] == word_w[:, None]
        mine_wt = jnp.where(here_wt & (best_t > 0)[None], bit_t[None], dtype.type(0))
        serves_tk = ((open_wtk & mine_wt[:, :, None]) != 0).any(axis=0)
        left_wtk = jnp.where(serves_tk[None], dtype.type(0), open_wtk)
        return left_wtk, jnp.where(serves_tk, place_t[:, None], chosen_tk)

    rounds = min(k, num_servers)
    nobody_tk = jnp.full((tokens, k), -1, jnp.int32)
    return lax.fori_loop(0, rounds, visit_next, (open_wtk, nobody_tk))[1]
