"""Prices for `transport`: Newton's method on its dual, smoothed; runs with 64-bit integers.

At temperature t an item chooses among the nonempty sets of servers at random, with weights
exp(sum of r / t), where r[n,j] = values[n,j] - prices[n]. The dual value becomes

    sum_n prices[n] capacities[n] + t sum_j log(prod_n (1 + exp(r[n,j] / t)) - 1),

a smooth convex function of the N prices, whose gradient and Hessian are expectations and
covariances of the choice. Its minimum is followed while t falls.

An item that needs h holders is on its h - 1 best servers whatever else it chooses, and so chooses
among the others. That is not smooth where these best servers change, but the lower t, the rarer is
an item for which it matters.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

#: Prices are kept within this, far beyond any value; only capacities of 0 or everything get near.
MAX_PRICE = 2**60
#: Minus this, a value minus a price that no other is below.
NEVER = 2**62

#: The temperature falls to this share once the expected numbers of copies are near the capacities.
NEXT_TEMPERATURE = np.float64(0.25)
#: Surplus or missing copies per server, in the mean, that count as near. Following the minimum more
#: closely does not pay.
NEAR = 0.3
#: Surplus or missing copies per server, in the mean, that are left to `balance`.
FEW = 0.5
#: Newton steps in all; 40 to 200 are usual, most where many values are equal.
MAX_STEPS = 500
#: Added to the Hessian, whose entries count undecided copies: servers may have none left.
RIDGE = np.float64(1e-6)
#: Values of one block of items are worked on at a time, so that they stay in the cache.
BLOCK = 2**15


def in_blocks(values_nj: jax.Array, layers: int) -> jax.Array:
    """Values by blocks of items, some layers each: [blocks, n, items of a block]."""
    servers, items = values_nj.shape
    fitting = [k for k in range(1, layers + 1) if layers % k == 0 and servers * items <= BLOCK * k]
    blocks = fitting[0] if fitting else layers
    return jnp.swapaxes(values_nj.reshape(servers, blocks, items // blocks), 0, 1)


def best(reduced_nj: jax.Array, count: int) -> jax.Array:
    """The `count` best servers of every item, ties: lowest server; bool [n, j]."""
    server_n1 = jnp.arange(reduced_nj.shape[0])[:, None]
    best_nj = jnp.zeros(reduced_nj.shape, bool)
    for _ in range(count):
        left_nj = jnp.where(best_nj, -NEVER, reduced_nj)
        best_nj = best_nj | (left_nj.argmax(axis=0)[None, :] == server_n1)
    return best_nj


def _expectations(
    values_knb: jax.Array, prices_n: jax.Array, temperature: jax.Array, holders: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Copies of each server, expected and at temperature 0, and the Hessian of D x temperature.

    A copy of an item is on n with probability x = s / (1 - q), where s = 1 / (1 + exp(-r / t)), and
    q = prod_n (1 - s) is the probability of the empty set, were it allowed. Two servers n, m have
    covariance -q x_n x_m, one has variance x - x^2.
    """
    servers = values_knb.shape[1]

    def add_block(sums, values_nb):
        reduced_nb = values_nb - prices_n[:, None]
        sure_nb = best(reduced_nb, holders - 1)
        reduced_nb = jnp.where(sure_nb, -NEVER, reduced_nb)
        best_b = reduced_nb.max(axis=0)
        decided_n = (sure_nb | (reduced_nb >= jnp.minimum(best_b, 1)[None, :])).sum(axis=1)
        r_nb = reduced_nb.astype(jnp.float64) / temperature
        # Far below 0 only differences matter; exp must not underflow.
        r_nb = r_nb - jnp.minimum(r_nb.max(axis=0) + 40, 0)[None, :]
        small_nb = jnp.exp(-jnp.abs(r_nb))
        s_nb = jnp.where(r_nb > 0, 1.0, small_nb) / (1 + small_nb)
        # 1 / q = exp(above) (1 + more). Both matter where 1 - q is tiny: with 1 - q rounded the
        # Hessian would be indefinite.
        above_b = jnp.maximum(r_nb, 0).sum(axis=0)
        more_b = lax.reduce(small_nb, 0.0, lambda p, e: p + e + p * e, (0,))
        some_b = (more_b - jnp.expm1(-above_b)) / (1 + more_b)
        none_b = jnp.exp(-above_b) / (1 + more_b)
        x_nb = s_nb / some_b[None, :]
        root_nb = x_nb * jnp.sqrt(none_b)[None, :]
        variance_n = x_nb.sum(axis=1) - (x_nb * x_nb) @ some_b
        hessian_nn = jnp.diag(variance_n) - root_nb @ root_nb.T
        expected_n = jnp.where(sure_nb, 1.0, x_nb).sum(axis=1)
        added = expected_n, decided_n, hessian_nn
        return jax.tree.map(jnp.add, sums, added), None

    start = (
        jnp.zeros(servers),
        jnp.zeros(servers, jnp.int64),
        jnp.zeros((servers, servers)),
    )
    return lax.scan(add_block, start, values_knb)[0]


class _Annealing(NamedTuple):
    """State of `anneal`."""

    prices_n: jax.Array
    #: The prices at the end of the last temperature.
    last_n: jax.Array
    temperature: jax.Array
    levels: jax.Array
    steps: jax.Array
    #: Surplus and missing copies if items choose for these prices.
    misplaced: jax.Array


def anneal(
    values_knb: jax.Array,
    capacities_n: jax.Array,
    prices_n: jax.Array,
    temperature: jax.Array,
    holders: int,
) -> jax.Array:
    """Prices for which `choose` nearly holds what the servers can: int64 [n].

    Args:
        values_knb: int64, from `in_blocks`.
        capacities_n: int64.
        prices_n: int64, where to start.
        temperature: float64, in units of values, about as far as prices may be off.
        holders: servers that every item needs.
    """
    servers = capacities_n.shape[0]

    def many(misplaced: jax.Array) -> jax.Array:
        return misplaced.astype(jnp.float64) > FEW * servers

    def newton(state: _Annealing) -> _Annealing:
        expected_n, decided_n, hessian_nn = _expectations(
            values_knb, state.prices_n, state.temperature, holders
        )
        gradient_n = capacities_n.astype(jnp.float64) - expected_n
        step_n = -jnp.linalg.solve(hessian_nn + RIDGE * jnp.eye(servers), gradient_n)
        # The quadratic model holds while exponents change by about 1; longer steps are cut.
        longest = jnp.maximum(jnp.abs(step_n).max(), 1)
        step_n = step_n * ((1 + jnp.log(longest)) / longest * state.temperature)
        prices_n = _moved(state.prices_n, step_n)
        misplaced = jnp.abs(decided_n - capacities_n).sum()
        # Whole numbers may not come nearer: each may be off by a half.
        nearest = NEAR * servers + jnp.trace(hessian_nn) / state.temperature
        near = jnp.abs(gradient_n).sum() < nearest
        # Prices are nearly linear in the temperature, exactly so where it only decides ties.
        slope_n = (prices_n - state.last_n).astype(jnp.float64) * NEXT_TEMPERATURE
        ahead_n = jnp.where(near & (state.levels > 0), slope_n, 0.0)
        return _Annealing(
            jnp.where(many(misplaced), _moved(prices_n, ahead_n), state.prices_n),
            jnp.where(near, prices_n, state.last_n),
            jnp.where(near, state.temperature * NEXT_TEMPERATURE, state.temperature),
            state.levels + near.astype(jnp.int64),
            state.steps + 1,
            misplaced,
        )

    def unfinished(state: _Annealing) -> jax.Array:
        return many(state.misplaced) & (state.temperature >= 1) & (state.steps < MAX_STEPS)

    zero = jnp.int64(0)
    start = _Annealing(prices_n, prices_n, temperature, zero, zero, jnp.int64(servers + 1))
    return lax.while_loop(unfinished, newton, start).prices_n


def _moved(prices_n: jax.Array, step_n: jax.Array) -> jax.Array:
    """Prices after a step: int64 [n]. The sum is of integers, which are more exact than float64."""
    step_n = jnp.round(jnp.clip(step_n, -MAX_PRICE, MAX_PRICE)).astype(jnp.int64)
    return jnp.clip(prices_n + step_n, -MAX_PRICE, MAX_PRICE)
