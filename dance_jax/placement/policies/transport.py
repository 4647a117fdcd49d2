"""Exact solver of the transportation problem behind `optimal`; runs with 64-bit integers.

Items j are to be copied to servers n; a copy is worth values[n, j], a whole number:

    maximise  sum_nj values[n,j] x[n,j],  x[n,j] in {0, 1}
    subject to  sum_n x[n,j] >= h for every item,  sum_j x[n,j] = capacities[n] for every server

for a number h of holders that every item needs. The matrix is that of a bipartite graph, hence
totally unimodular: relaxed, the program keeps an integral optimum. With a price per server its dual
is

    D(prices) = sum_n prices[n] capacities[n] + sum_j g_j,   r[n,j] = values[n,j] - prices[n]
    g_j = the sum of the h greatest r[n,j], and of the others that are positive,

an upper bound for any prices, reached by copies that the items choose for these prices
(`choose`) once every server holds as many as it can. Two phases find them:

1. `prices.anneal` looks for prices with Newton's method on D, smoothed less and less.
2. `balance` settles what prices alone leave open: servers that hold too much hand copies to those
   that hold too little along shortest paths of exchanges, which keeps the copies optimal for their
   numbers throughout. It ends with exactly the capacities, so the result is the optimum whatever
   phase 1 did; a good start only makes it faster.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dance_jax.placement.policies.prices import anneal, best, in_blocks

#: Cost of an exchange that is not possible.
NO_ARC = np.int64(2**62)
#: Bits of a value at most, which leaves room for prices.
VALUE_BITS = 55


class Solution(NamedTuple):
    """The copies of greatest value, and the proof."""

    #: bool [servers, items]: the copies.
    held_nj: jax.Array
    #: int64 [servers]: the last prices of `anneal`, a start for similar problems.
    prices_n: jax.Array
    #: int64 [servers + 1, servers + 1]: costs of the cheapest exchanges (`balance`); no cycle is
    #: negative, which proves the optimum.
    arcs_mm: jax.Array


def value_bits(servers: int) -> int:
    """Bits that values may have: costs of all arcs of a path add up to less than NO_ARC."""
    return min(VALUE_BITS, 62 - (servers + 1).bit_length())


def choose(values_nj: jax.Array, prices_n: jax.Array, holders: int) -> jax.Array:
    """The copies of greatest value minus price: bool [n, j].

    An item goes to every server where its value exceeds the price, and always to the `holders` best
    ones (ties: lowest server).
    """
    reduced_nj = values_nj - prices_n[:, None]
    return (reduced_nj > 0) | best(reduced_nj, holders)


class _Sides(NamedTuple):
    """What nodes can give and take: [servers + 1, items]; the last row is the spare."""

    values_mj: jax.Array
    gives_mj: jax.Array
    takes_mj: jax.Array

    def cost(self, giver_a: jax.Array, taker_a: jax.Array) -> jax.Array:
        """The cost of every item that goes from one node to another: int64 [a, j].

        Either argument may be a single node, [1], for all nodes of the other.
        """
        possible_aj = self.gives_mj[giver_a] & self.takes_mj[taker_a]
        cost_aj = self.values_mj[giver_a] - self.values_mj[taker_a]
        return jnp.where(possible_aj, cost_aj, NO_ARC)


def _sides(values_nj: jax.Array, held_nj: jax.Array, holders: int) -> _Sides:
    """The nodes between which copies move.

    The spare stands for copies that no server holds: it takes a copy of any item that has more than
    `holders`, and gives a copy of any item. Its copies are worth nothing.
    """
    duplicate_1j = held_nj.sum(axis=0, keepdims=True) > holders
    return _Sides(
        jnp.pad(values_nj, ((0, 1), (0, 0))),
        jnp.pad(held_nj, ((0, 1), (0, 0)), constant_values=True),
        jnp.concatenate([~held_nj, duplicate_1j]),
    )


def _all_arcs(sides: _Sides) -> jax.Array:
    """Least cost of giving an item from one node to another: int64 [m, m]."""
    node_m = jnp.arange(sides.values_mj.shape[0])
    return lax.map(lambda giver: sides.cost(giver[None], node_m).min(axis=1), node_m)


def distances(arcs_mm: jax.Array, start_m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Costs of the cheapest paths to every node, and the node before it (Bellman and Ford).

    Of equally cheap paths these are the ones with fewest arcs. Both are int64 [m]; the node before
    a start is -1.

    Args:
        arcs_mm: int64, from row to column, NO_ARC if there is no arc; without negative cycles.
        start_m: int64, cost of starting at a node, or NO_ARC.
    """

    def lengthen(state):
        distance_m, before_m, _ = state
        there_mm = (distance_m[:, None] < NO_ARC) & (arcs_mm < NO_ARC)
        through_mm = jnp.where(there_mm, distance_m[:, None] + arcs_mm, NO_ARC)
        shorter_m = through_mm.min(axis=0) < distance_m
        return (
            jnp.where(shorter_m, through_mm.min(axis=0), distance_m),
            jnp.where(shorter_m, through_mm.argmin(axis=0), before_m),
            shorter_m.any(),
        )

    start = start_m, jnp.full(start_m.shape, -1, jnp.int64), jnp.bool_(True)
    return lax.while_loop(lambda state: state[2], lengthen, start)[:2]


def balance(
    values_nj: jax.Array, capacities_n: jax.Array, held_nj: jax.Array, holders: int
) -> tuple[jax.Array, jax.Array]:
    """Moves copies until every server holds its capacity, with the least loss of value.

    The copies must have the greatest value for the numbers that servers hold, as those of `choose`
    have; then the result has, too (Edmonds and Karp's successive shortest paths). Nodes are the
    servers and the spare (`_sides`). On a shortest path with fewest arcs no item moves twice: if it
    went from a to b and later from c to d, it could go from a to d directly, and the rest would be
    a cycle, which costs at least nothing.

    Returns:
        The copies, bool [n, j], and the costs of further exchanges, int64 [n + 1, n + 1].
    """

    def surplus(held_nj: jax.Array) -> jax.Array:
        surplus_n = held_nj.sum(axis=1) - capacities_n
        return jnp.append(surplus_n, -surplus_n.sum())

    def shift(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        held_nj, arcs_mm = state
        sides, surplus_m = _sides(values_nj, held_nj, holders), surplus(held_nj)
        distance_m, before_m = distances(arcs_mm, jnp.where(surplus_m > 0, 0, NO_ARC))
        target = jnp.argmin(jnp.where(surplus_m < 0, distance_m, NO_ARC))

        def give(step):
            held_nj, taker = step
            giver = before_m[taker]
            item = jnp.argmin(sides.cost(giver[None], taker[None])[0])
            # The spare has no row: updates out of bounds are dropped.
            held_nj = held_nj.at[giver, item].set(False, mode="drop")
            return held_nj.at[taker, item].set(True, mode="drop"), giver

        def on_path(step):
            return before_m[step[1]] >= 0

        held_nj, source = lax.while_loop(on_path, give, (held_nj, target))
        sides = _sides(values_nj, held_nj, holders)
        node_m = jnp.arange(surplus_m.shape[0])

        def refresh(node: jax.Array, arcs_mm: jax.Array) -> jax.Array:
            arcs_mm = arcs_mm.at[node, :].set(sides.cost(node[None], node_m).min(axis=1))
            return arcs_mm.at[:, node].set(sides.cost(node_m, node[None]).min(axis=1))

        arcs_mm, _ = lax.while_loop(
            on_path,
            lambda step: (refresh(step[1], step[0]), before_m[step[1]]),
            (arcs_mm, target),
        )
        return held_nj, refresh(source, arcs_mm)

    start = held_nj, _all_arcs(_sides(values_nj, held_nj, holders))
    return lax.while_loop(lambda state: (surplus(state[0]) != 0).any(), shift, start)


@functools.partial(jax.jit, static_argnames=("layers", "holders"))
def solve(
    values_nj: jax.Array,
    capacities_n: jax.Array,
    prices_n: jax.Array,
    temperature: jax.Array,
    layers: int,
    holders: int,
) -> Solution:
    """The copies of greatest value.

    Args:
        values_nj: int64, from 0 to 2**value_bits(n).
        capacities_n: int64, at most j each and at least holders * j in all.
        prices_n: int64, where to start.
        temperature: float64, in units of values, about as far as prices may be off.
        layers: a divisor of j, for the size of blocks.
        holders: servers that every item needs, from 1 to n.
    """
    prices_n = anneal(in_blocks(values_nj, layers), capacities_n, prices_n, temperature, holders)
    chosen_nj = choose(values_nj, prices_n, holders)
    held_nj, arcs_mm = balance(values_nj, capacities_n, chosen_nj, holders)
    return Solution(held_nj, prices_n, arcs_mm)
