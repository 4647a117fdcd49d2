"""`optimal`: the exact optimum of the paper's objective (arXiv:2508.12851), with proof."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dance_jax.placement.core import Placement
from dance_jax.placement.policies.dance import dance
from dance_jax.placement.policies.prices import best
from dance_jax.placement.policies.transport import (
    NO_ARC,
    Solution,
    distances,
    solve,
    value_bits,
)
from dance_jax.placement.problem import Problem

#: Fewer moves may cost this share of the fewest possible remote calls.
CHURN_LOSS = 0.01
#: The bonus of residents that stay is found by bisection over how often it grows by GROWTH: the
#: steps of that number.
STEPS = (64, 32, 16, 8, 4, 2, 1)
GROWTH = 2 ** (1 / 16)
#: Bits that decide what calls and favourites leave open, so that few ties are left to break.
NOISE_BITS = 10
#: Bonuses differ between residents by up to this power of 1/2.
SPREAD_BITS = 3
#: Relative errors of summation stay below this.
ROUNDING = 1e-12


class Scale(NamedTuple):
    """How calls, favourites and noise share an integer, so that each only breaks ties of the last.

    Placements are compared along cycles of exchanges, one per node of `transport.balance` at most.
    So many differences of what is below the unit must not add up to it.
    """

    #: Place of the bit of a favourite.
    favourite: int
    #: Place of the lowest bit of calls.
    calls: int
    #: Bits of calls.
    bits: int

    @classmethod
    def of(cls, servers: int) -> Scale:
        cycle_bits = (servers + 1).bit_length()
        calls = NOISE_BITS + 2 * cycle_bits
        # One bit is left for the bonus of favourites.
        return cls(NOISE_BITS + cycle_bits, calls, value_bits(servers) - calls - 1)


@jax.jit
def _whole(counts_nj: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Counts as integers of at most Scale.bits bits, and the power of two of their unit.

    Whole counts below that stay exact.
    """
    _, exponent = jnp.frexp(counts_nj.max())
    unit = exponent - Scale.of(counts_nj.shape[0]).bits
    return jnp.round(jnp.ldexp(counts_nj, -unit)).astype(jnp.int64), unit


@jax.jit
def _values(whole_nj: jax.Array, favourite_nj: jax.Array, bonus: jax.Array) -> jax.Array:
    """The values of copies: int64 [n, j].

    Args:
        whole_nj: int64 calls.
        favourite_nj: bool, copies that are preferred if calls are equal.
        bonus: int64, additional calls of a favourite, which vary by up to 2**-SPREAD_BITS of it.
    """
    scale = Scale.of(whole_nj.shape[0])
    key = jax.random.key(0, impl="threefry2x32")
    random_nj = jax.random.bits(key, whole_nj.shape, jnp.uint32)
    noise_nj = (random_nj >> (32 - NOISE_BITS)).astype(jnp.int64)
    # With equal bonuses all copies of equal calls would give way at once.
    bonus_nj = bonus + ((bonus * noise_nj) >> (NOISE_BITS + SPREAD_BITS))
    favourite_nj = favourite_nj.astype(jnp.int64)
    calls_nj = (whole_nj + bonus_nj * favourite_nj) << scale.calls
    return calls_nj + (favourite_nj << scale.favourite) + noise_nj


@functools.partial(jax.jit, static_argnames="holders")
def _gap(
    counts_nj: jax.Array, unit: jax.Array, held_nj: jax.Array, arcs_mm: jax.Array, holders: int
) -> jax.Array:
    """The most calls by which any placement can beat this optimum of rounded counts.

    The dual value, for prices from the costs of exchanges in calls alone, minus the calls at home:
    0 except for rounding.
    """
    shift = Scale.of(counts_nj.shape[0]).calls
    calls_mm = jnp.where(arcs_mm < NO_ARC, (arcs_mm + (1 << (shift - 1))) >> shift, NO_ARC)
    distance_m, _ = distances(calls_mm, jnp.zeros(arcs_mm.shape[0], jnp.int64))
    price_n = jnp.ldexp((distance_m[-1] - distance_m[:-1]).astype(jnp.float64), unit)
    reduced_nj = counts_nj - price_n[:, None]
    chosen_nj = best(reduced_nj, holders) | (reduced_nj > 0)
    most_j = jnp.where(chosen_nj, reduced_nj, 0).sum(axis=0)
    return (most_j - jnp.where(held_nj, reduced_nj, 0).sum(axis=0)).sum()


class _Search:
    """Finds the optimum for counts [n, j], with and without a bonus on favourites."""

    def __init__(self, counts_nj: np.ndarray, problem: Problem, favourite_nj: np.ndarray):
        self.counts_nj = jnp.asarray(counts_nj)
        self.favourite_nj = jnp.asarray(favourite_nj)
        self.capacities_n = jnp.asarray(problem.capacities)
        self.layers, self.holders = problem.counts.shape[1], problem.holders
        self.whole_nj, self.unit = _whole(self.counts_nj)

    def best(self, bonus: int = 0, near: Solution | None = None) -> Solution:
        """The copies with most calls and bonuses; if equal, with most favourites.

        Args:
            bonus: calls, in units of `whole_nj`.
            near: the optimum for a smaller bonus, to start from.
        """
        values_nj = _values(self.whole_nj, self.favourite_nj, jnp.int64(bonus))
        if near is None:
            prices_n = jnp.zeros_like(self.capacities_n)
            temperature = values_nj.max().astype(jnp.float64) / 4
        else:
            prices_n = near.prices_n
            temperature = jnp.float64(bonus << Scale.of(len(values_nj)).calls)
        return solve(values_nj, self.capacities_n, prices_n, temperature, self.layers, self.holders)

    def remote(self, solution: Solution) -> float:
        """The number of remote calls."""
        return float(jnp.where(solution.held_nj, 0.0, self.counts_nj).sum())

    def moves(self, solution: Solution) -> int:
        """The number of copies that are not favourites."""
        return int((solution.held_nj & ~self.favourite_nj).sum())

    def calmer(self, optimum: Solution) -> Solution:
        """Of placements that lose at most CHURN_LOSS, one with fewer moves."""
        moves = self.moves(optimum)
        remote_nj = jnp.where(optimum.held_nj, 0, self.whole_nj)
        # A placement that is best with this bonus loses at most the bonuses of all moves saved.
        affordable = CHURN_LOSS * int(remote_nj.sum()) / (1 + 2**-SPREAD_BITS)
        bonus = int(affordable) // max(moves, 1)
        if bonus == 0:
            return optimum
        allowed = (1 + CHURN_LOSS) * self.remote(optimum)
        largest = int(2 ** Scale.of(len(self.counts_nj)).bits / (1 + 2**-SPREAD_BITS))
        calmest, grown = optimum, 0
        # Loss grows with the bonus and moves shrink, so the largest affordable one is bisected.
        for step in STEPS:
            larger = int(bonus * GROWTH ** (grown + step - 1))
            tried = self.best(min(larger, largest), optimum)
            if self.remote(tried) <= allowed and self.moves(tried) <= self.moves(calmest):
                calmest, grown = tried, grown + step
        return calmest


def optimal(problem: Problem) -> Placement:
    """The placement with the fewest remote calls, and the bound that proves it.

        maximise  sum over n, l, e of counts[n,l,e] resident[n,l,e]
        subject to  every (l, e) on at least h servers,  server n holding at most capacities[n],

    the objective of DanceMoE if h = `holders` is 1, is a transportation problem (`transport`),
    solved exactly for counts rounded to integers (38 bits for 3 servers, 30 for 64; smaller whole
    counts stay exact). All slots are used. Without any count all experts count the same. Of equally
    good placements it is the one with most residents in common with `previous`, or else with
    `dance`.

    With `previous`, each of its residents gets a bonus, so that fewer experts move. It is the
    largest bonus, found by bisection, for which remote calls exceed the fewest by at most
    CHURN_LOSS. `upper_bound` is that of the counts themselves: the dual value over all counts,
    rounded up.

    Worked example: one layer of 4 experts, two servers with 2 slots, calls [9, 5, 1, 0] and
    [8, 6, 0, 1]. At a price of 8 calls a slot no second copy pays and every expert is worth most
    where it is called most: server 0 holds {0, 2}, server 1 {1, 3}, which keeps 17 of 30 calls at
    home (`dance`: 15). The dual value 4 * 8 + (9 - 8) + (6 - 8) + (1 - 8) + (1 - 8) is 17 as well,
    so nothing is better.
    """
    counts = problem.counts if problem.counts.any() else np.ones_like(problem.counts)
    previous = problem.previous
    favourites = (dance(problem) if previous is None else previous).resident
    servers = len(counts)
    with jax.enable_x64(True):
        search = _Search(counts.reshape(servers, -1), problem, favourites.reshape(servers, -1))
        optimum = search.best()
        gap = float(
            _gap(search.counts_nj, search.unit, optimum.held_nj, optimum.arcs_mm, problem.holders)
        )
        chosen = optimum if previous is None else search.calmer(optimum)
        best, resident = (
            np.asarray(solution.held_nj).reshape(counts.shape) for solution in (optimum, chosen)
        )
    share = Placement(best).local_share(problem.counts)
    bound = min(1.0, share + max(gap, 0.0) / counts.sum() + ROUNDING)
    # A share of everything may be summed to a little more than 1.
    return Placement(resident, max(float(bound), share))
