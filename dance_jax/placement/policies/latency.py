"""`latency`: the placement with the least predicted time of a layer.

Annealing (Kirkpatrick et al. 1983) on the formula of `Problem.cost`, all layers at once: every
round proposes a change to each layer, and accepts or rejects each change. Two things tie layers
together. One is the memory of a server: in some rounds layers are paired, and one layer gets a slot
that the other gives up. The other is the load that layers share (`Times.shared`): each layer's
change is judged as if it were the only one.

A change consists of two half moves between the same two places, there and back, in one layer or in
a pair of layers. A place is a server or `outside`. A half move from server a to server b moves an
expert, one from a to outside drops a copy of an expert with more than `Problem.holders`, and one
from outside to b adds a copy. So every server keeps its number of experts, and every expert its
holders.

The expert that moves is drawn at random, more likely one that is used more at the new place than at
the old one. For a part of the moves it is an expert that a random token of the new place misses.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.config import UserError
from dance_jax.placement.core import Placement
from dance_jax.placement.flows import Sample, flows, work
from dance_jax.placement.policies.layers import layers
from dance_jax.placement.policies.optimal import optimal
from dance_jax.placement.policies.repair import repaired
from dance_jax.placement.policies.rounding import fill
from dance_jax.placement.problem import Problem
from dance_jax.placement.times import Times

#: The fraction of rounds that pair layers, and of half moves to a server that take an expert which
#: a token misses.
PAIRED, WANTED = 0.5, 0.8
#: The score of such an expert: above any other.
WANTED_SCORE = 1e9
#: Added to uses per token before their logarithms are compared, so that rare uses hardly count.
RARE = 1e-3
#: Placements whose times differ by less than this share count as equal; the one that moves fewer
#: experts is taken.
TOLERANCE = 0.01
#: Prices of a move that are tried, in TOLERANCE / moves: at price 1 all moves together cost
#: TOLERANCE.
MOVE_PRICES = (12.0, 8.0, 4.0)


class Schedule(NamedTuple):
    """The length and temperatures of an annealing."""

    #: Changes proposed to each layer.
    rounds: int
    #: Temperatures of the first and the last round, in mean layer times of the start divided by the
    #: number of servers: of many servers a change affects few.
    hot: float
    cold: float


#: From any start to a good placement; from a good placement to a better one; close to a placement.
SEARCH, REFINE = Schedule(4000, 9e-2, 3e-3), Schedule(4000, 9e-3, 9e-4)
SETTLE = Schedule(2000, 3e-3, 3e-4)
#: The words that `flows` reads in an annealing at most: large clusters get fewer rounds, at least
#: LEAST_ROUNDS.
MOST_WORK = 6e9
LEAST_ROUNDS = 20


class Annealing(NamedTuple):
    """The state of an annealing; n servers, l layers, e experts."""

    #: bool [n, l, e]: the placement.
    resident: Array
    #: float32 [l]: predicted seconds of each layer alone, plus the price of its moves.
    seconds: Array
    #: float32 [l, x]: each layer's part of the load that layers share.
    load: Array


class Goal(NamedTuple):
    """What an annealing minimises."""

    sample: Sample
    times: Times
    #: bool [n, l, e]: the placement from which experts move.
    previous: Array
    #: float32 []: the price of moving one expert, in seconds.
    move: Array
    #: int32 []: servers that must hold each expert.
    holders: Array

    def state(self, resident: Array) -> Annealing:
        seconds_bl, load = self.times.layers(flows(self.sample, resident))
        moved_l = (resident & ~self.previous).sum((0, 2), dtype=jnp.int32)
        return Annealing(
            resident, seconds_bl.mean(0) + self.move * moved_l.astype(jnp.float32), load
        )

    def seconds(self, state: Annealing) -> Array:
        """Seconds of all layers."""
        return state.seconds.sum() + self.times.shared(state.load.sum(0))


def _scores(goal: Goal, resident: Array, place_l: Array, from_l: Array, key: Array) -> Array:
    """Random scores of experts for a move to a place: float32 [l, e]."""
    servers, num_layers, experts = resident.shape
    layer_l = jnp.arange(num_layers, dtype=jnp.int32)
    noise_key, token_key, which_key = jax.random.split(key, 3)
    everywhere = goal.sample.used.mean(0, keepdims=True)
    used = jnp.log(jnp.concatenate([goal.sample.used, everywhere]) + RARE)
    score_le = used[place_l, layer_l] - used[from_l, layer_l]
    score_le = score_le + jax.random.gumbel(noise_key, score_le.shape)
    # An expert that a random token of the place misses comes first.
    draw = jax.random.uniform(token_key, (2, num_layers))
    server_l = jnp.minimum(place_l, servers - 1)
    token_l = (draw[0] * jnp.float32(goal.sample.experts.shape[1])).astype(jnp.int32)
    chosen_lk = goal.sample.experts[server_l, token_l, layer_l]
    misses_lk = ~resident[server_l[:, None], layer_l[:, None], chosen_lk]
    luck_lk = jax.random.uniform(which_key, chosen_lk.shape)
    which_l1 = jnp.argmax(jnp.where(misses_lk, luck_lk, jnp.float32(-1)), axis=1, keepdims=True)
    wanted_l1 = jnp.take_along_axis(chosen_lk, which_l1, axis=1)
    first_l = (draw[1] < WANTED) & (place_l < servers) & misses_lk.any(1)
    is_first_le = first_l[:, None] & (jnp.arange(experts, dtype=jnp.int32)[None] == wanted_l1)
    return jnp.where(is_first_le, jnp.float32(WANTED_SCORE), score_le)


def _half_move(
    resident: Array, score_le: Array, from_l: Array, to_l: Array, not_l: Array, holders: Array
) -> tuple[Array, Array]:
    """Moves in each layer the movable expert with the greatest score.

    Args:
        resident: bool [n, l, e].
        score_le: float32 [l, e], scores of the experts.
        from_l, to_l: int32 [l], servers; n means outside.
        not_l: int32 [l], an expert that must not move.
        holders: int32 [], servers that must hold each expert.

    Returns:
        The expert of each layer, int32 [l], e if none can move; the placement after the move.
    """
    servers, num_layers, experts = resident.shape
    layer_l = jnp.arange(num_layers, dtype=jnp.int32)
    outside = jnp.zeros((1, num_layers, experts), bool)
    held = jnp.concatenate([resident, outside])
    here_le = held[from_l, layer_l] | (from_l == servers)[:, None]
    # A copy may be dropped if enough others remain.
    copies_le = resident.sum(0, dtype=jnp.int32)
    free_le = ~held[to_l, layer_l] & ((to_l < servers)[:, None] | (copies_le > holders))
    movable_le = here_le & free_le & (jnp.arange(experts, dtype=jnp.int32)[None] != not_l[:, None])
    score_le = jnp.where(movable_le, score_le, jnp.float32(-jnp.inf))
    expert_l = jnp.argmax(score_le, axis=1).astype(jnp.int32)
    expert_l = jnp.where(movable_le.any(1), expert_l, jnp.int32(experts))
    return expert_l, _put(resident, layer_l, expert_l, from_l, to_l)


def _put(resident: Array, layer_l: Array, expert_l: Array, from_l: Array, to_l: Array) -> Array:
    """Moves one expert of each layer; places and experts out of range are ignored."""
    resident = resident.at[from_l, layer_l, expert_l].set(False, mode="drop")
    return resident.at[to_l, layer_l, expert_l].set(True, mode="drop")


def _partners(draw_l: Array) -> Array:
    """Pairs layers at random, an odd one with itself: int32 [l], the partner of each layer."""
    num_layers = len(draw_l)
    order = jnp.argsort(draw_l).astype(jnp.int32)
    even = num_layers // 2 * 2
    swapped = jnp.concatenate([order[:even].reshape(-1, 2)[:, ::-1].reshape(-1), order[even:]])
    return jnp.zeros(num_layers, jnp.int32).at[order].set(swapped)


def _round(goal: Goal, key: Array, temperature: Array, state: Annealing) -> Annealing:
    """Proposes a change to every layer, or to every pair of layers, and accepts or rejects it."""
    servers, num_layers, experts = state.resident.shape
    draw_key, first_key, second_key = jax.random.split(key, 3)
    draw = jax.random.uniform(draw_key, (5, num_layers))
    paired_l, order_l, place_l, shift_l, luck_l = draw
    itself_l = jnp.arange(num_layers, dtype=jnp.int32)
    partner_l = jnp.where(paired_l[0] < PAIRED, _partners(order_l), itself_l)
    leader_l = jnp.minimum(itself_l, partner_l)

    # Two different places for each pair of layers; the last place is outside.
    place_l = (place_l * (servers + 1)).astype(jnp.int32)
    other_l = (place_l + 1 + (shift_l * servers).astype(jnp.int32)) % (servers + 1)
    a_l, b_l = place_l[leader_l], other_l[leader_l]

    # The leader moves an expert from a to b. Its partner, or itself if alone, moves one back.
    leads_l, alone_l = leader_l == itself_l, partner_l == itself_l
    from_l, to_l = jnp.where(leads_l, a_l, b_l), jnp.where(leads_l, b_l, a_l)
    nothing_l = jnp.full(num_layers, experts, jnp.int32)
    score_le = _scores(goal, state.resident, to_l, from_l, first_key)
    first_l, resident = _half_move(state.resident, score_le, from_l, to_l, nothing_l, goal.holders)
    score_le = _scores(goal, resident, from_l, to_l, second_key)
    second_l, back = _half_move(resident, score_le, to_l, from_l, first_l, goal.holders)
    possible_l = (first_l < experts) & ((second_l < experts) | ~alone_l)
    resident = jnp.where(alone_l[:, None], back, resident)
    changed = goal.state(resident)

    def of_pair(own: Array) -> Array:
        """The sum over each layer and its partner."""
        alone = alone_l.reshape(-1, *[1] * (own.ndim - 1))
        return own + jnp.where(alone, jnp.float32(0), own[partner_l])

    whole = state.load.sum(0)
    together_l = goal.times.shared(whole[None] + of_pair(changed.load - state.load))
    gain_l = of_pair(state.seconds - changed.seconds) + goal.times.shared(whole) - together_l
    luck_l = jnp.log(luck_l[leader_l]) * temperature
    take_l = possible_l & possible_l[partner_l] & (luck_l < gain_l)
    return Annealing(
        jnp.where(take_l[:, None], changed.resident, state.resident),
        jnp.where(take_l, changed.seconds, state.seconds),
        jnp.where(take_l[:, None], changed.load, state.load),
    )


@jax.jit
def _anneal(
    goal: Goal, resident: Array, rounds: Array, hot: Array, cold: Array, seed: Array
) -> tuple[Array, Array]:
    """`Search.anneal`, with numbers as arrays []."""
    free = goal._replace(move=jnp.float32(0))
    unit = jnp.maximum(free.state(resident).seconds.mean(), jnp.finfo(jnp.float32).tiny)
    # `move` comes in the same unit.
    goal = goal._replace(move=goal.move * unit)
    key = jax.random.key(seed)

    def one(i: Array, state: Annealing) -> Annealing:
        done = i.astype(jnp.float32) / rounds.astype(jnp.float32)
        temperature = unit / len(resident) * hot * (cold / hot) ** done
        return _round(goal, jax.random.fold_in(key, i), temperature, state)

    end = lax.fori_loop(0, rounds, one, goal.state(resident))
    return end.resident, free.seconds(free.state(end.resident)) / len(end.seconds)


@jax.jit
def _seconds(goal: Goal, resident: Array) -> Array:
    """Mean seconds of a layer, on the sample."""
    return goal.seconds(goal.state(resident)) / resident.shape[1]


class Search:
    """Annealings on the routes and the cost of a problem.

    Args:
        problem: with routes and cost.
    """

    def __init__(self, problem: Problem) -> None:
        if problem.routes is None or problem.cost is None:
            raise UserError("latency: routes are needed; with counts alone use optimal")
        cost, self._seed, self._holders = problem.cost, problem.seed, problem.holders
        active_n = np.array([len(route) > 0 for route in problem.routes])
        experts = problem.counts.shape[2]
        self._sample = Sample.of(problem.routes, experts, cost.preferences(), blocks=cost.together)
        self._times = cost.times(problem.token_weights * active_n)

    def seconds(self, placement: Placement) -> float:
        """Predicted seconds of a layer, on the sample."""
        return float(_seconds(self._goal(placement, 0.0), jnp.asarray(placement.resident)))

    def anneal(
        self,
        start: Placement,
        schedule: Schedule,
        previous: Placement | None = None,
        move_cost: float = 0.0,
    ) -> tuple[Placement, float]:
        """Searches for a placement of less predicted time, with as many experts on each server.

        Args:
            start: every expert has the holders that the problem asks for.
            schedule: rounds and temperatures.
            previous: the placement from which experts move; default: `start`.
            move_cost: the price of moving one expert, in mean layer times of the start.

        Returns:
            The placement where the annealing ends, and its predicted seconds of a layer.
        """
        rounds = min(schedule.rounds, int(MOST_WORK / work(self._sample)))
        end, seconds = _anneal(
            self._goal(start if previous is None else previous, move_cost),
            jnp.asarray(start.resident),
            jnp.int32(max(rounds, LEAST_ROUNDS)),
            jnp.float32(schedule.hot),
            jnp.float32(schedule.cold),
            jnp.int32(self._seed),
        )
        return Placement(np.asarray(end)), float(seconds)

    def _goal(self, previous: Placement, move_cost: float) -> Goal:
        before = jnp.asarray(previous.resident)
        move, holders = jnp.float32(move_cost), jnp.int32(self._holders)
        return Goal(self._sample, self._times, before, move, holders)


def _kept(problem: Problem, previous: Placement) -> Placement:
    """`previous` with its free slots filled; if it does not fit, what `optimal` makes of it."""
    held_n = previous.resident.sum((1, 2))
    if (held_n > problem.capacities).any() or previous.short(problem.holders).any():
        return optimal(problem)
    with jax.enable_x64(True):
        arrays = (previous.resident, problem.counts, problem.capacities)
        return Placement(np.asarray(fill(*(jnp.asarray(array) for array in arrays))))


def _with_few_moves(problem: Problem, previous: Placement) -> Placement:
    """Of placements that are about equally good, one that moves few experts.

    This is `previous` itself if its time is within TOLERANCE of the best found. Otherwise it is the
    best placement, annealed again with the highest price on every move that keeps the time. The
    search starts from `previous` and also afresh: a placement made for another workload may lie in
    a local minimum, from which annealing can end at twice the time.
    """
    search, start = Search(problem), _kept(problem, previous)
    stays = search.seconds(start)
    found = [search.anneal(start, SEARCH), _afresh(problem, search)]
    enough = min(seconds for _, seconds in found) * (1 + TOLERANCE)
    if stays <= enough:
        return start
    best = min(
        (placement for placement, seconds in found if seconds <= enough),
        key=lambda placement: placement.moved(previous),
    )
    allowance = TOLERANCE * problem.counts.shape[1] / max(best.moved(previous), 1)
    for price in MOVE_PRICES:
        near, seconds = search.anneal(best, SETTLE, previous=previous, move_cost=price * allowance)
        if seconds <= enough and near.moved(previous) < best.moved(previous):
            return near
    return best


def _starts(problem: Problem) -> tuple[Placement, Placement]:
    """`optimal` and `layers`."""
    return optimal(problem), repaired(layers(problem), problem)


def _afresh(problem: Problem, search: Search) -> tuple[Placement, float]:
    """The best of three: SEARCH from `optimal`, REFINE from the better start, and that start."""
    problem = dataclasses.replace(problem, previous=None)
    starts = [(each, search.seconds(each)) for each in _starts(problem)]
    best = min(starts, key=lambda each: each[1])
    found = [search.anneal(starts[0][0], SEARCH), search.anneal(best[0], REFINE)]
    return min((best, *found), key=lambda each: each[1])


def latency(problem: Problem) -> Placement:
    """The placement with the least predicted time of a layer, on a sample of routes.

    DanceMoE minimises the number of remote calls. This policy minimises what a step waits for in
    each layer: links and devices, as the exchange in use waits for them (`Problem.cost`). Annealing
    from `optimal` and from `layers`, with all memory used, fits the placement to `problem.routes`;
    servers weigh by their tokens, according to `problem.counts`. Equal inputs, including the seed,
    give equal placements.

    With `problem.previous`, placements within 1 % of the least time found count as equal, and one
    that moves few experts is taken: `previous` itself if it is among them.

    Worked example with `LockStepCost.reference`: one layer of 4 experts, k = 1, two servers of 3
    and 2 slots with one device each. On both servers two of three tokens choose expert 0; the third
    chooses expert 1 on server 0 and expert 2 on server 1. With {0, 1, 3} and {0, 2} nothing leaves
    and each device runs half of the calls: 0.5. With {0, 1, 2} and {2, 3} server 1 sends 2/3 of a
    state per token, which server 0 computes: 2/3 + 5/6 + 0.3 x 1/3 = 1.6.

    Args:
        problem: with routes; `place` uses `optimal` if there are none.

    Raises:
        UserError: there are no routes.
    """
    if problem.previous is not None:
        return _with_few_moves(problem, problem.previous)
    return _afresh(problem, Search(problem))[0]
