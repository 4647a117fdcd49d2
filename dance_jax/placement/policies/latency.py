"""`latency`: the placement whose layers are predicted to take the least time.

Annealing (Kirkpatrick et al. 1983) on the formula of `Problem.cost`, all layers at once: every
round proposes a change to each layer, and accepts or refuses each. What ties layers together is the
memory of a server, so in some rounds layers are paired, and one gets a slot that the other gives;
and what they share (`Times.shared`), of which a layer's change counts as if it were the only one.

A change consists of two half moves between the same two places, there and back, in one layer or in
two. A place is a server or `outside`, where copies come from and go to: a half move from server a
to server b moves an expert, from a to outside drops a copy that is not the last, and from outside
to b adds one. So slots per server stay what they are and every expert stays somewhere.

Which expert moves is drawn: one that is used more at the new place than at the old is more likely,
and in a part of the moves it is one that a random token of the new place misses.
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
from dance_jax.placement.policies.rounding import fill
from dance_jax.placement.problem import Problem
from dance_jax.placement.times import Times

#: Of all rounds, those that move slots between layers; of half moves to a server, those of an
#: expert that a token misses.
PAIRED, WANTED = 0.5, 0.8
#: More than any other score.
WANTED_SCORE = 1e9
#: A use per token that counts nothing, in comparisons of what is used more.
RARE = 1e-3
#: Placements whose times differ by less are equals: the one that moves fewer experts is taken.
TOLERANCE = 0.01
#: What a move costs in search of it, in TOLERANCE / moves: with 1 all moves cost what they may.
MOVE_PRICES = (12.0, 8.0, 4.0)


class Schedule(NamedTuple):
    """How long and how wild an annealing is."""

    #: Changes proposed to each layer.
    rounds: int
    #: Temperatures of the first and the last round, in mean layer times of the start over servers:
    #: of many servers a change touches a small part.
    hot: float
    cold: float


#: From any start to a good placement; from a good one to a better one; in its neighbourhood.
SEARCH, REFINE = Schedule(4000, 9e-2, 3e-3), Schedule(4000, 9e-3, 9e-4)
SETTLE = Schedule(2000, 3e-3, 3e-4)
#: Most work of an annealing, in words that `flows` looks at: in large clusters there are fewer
#: rounds.
MOST_WORK = 6e9
LEAST_ROUNDS = 20


class Annealing(NamedTuple):
    """Where an annealing stands; n servers, l layers, e experts."""

    #: bool [n, l, e]: the placement.
    resident: Array
    #: float32 [l]: predicted seconds of each layer by itself, and of its moves.
    seconds: Array
    #: float32 [l, x]: its part of what layers share.
    load: Array


class Goal(NamedTuple):
    """What is sought."""

    sample: Sample
    times: Times
    #: bool [n, l, e]: where experts come from, and seconds that moving one counts.
    previous: Array
    move: Array

    def state(self, resident: Array) -> Annealing:
        seconds_bl, load = self.times.layers(flows(self.sample, resident))
        moved_l = (resident & ~self.previous).sum((0, 2), dtype=jnp.int32)
        return Annealing(
            resident, seconds_bl.mean(0) + self.move * moved_l.astype(jnp.float32), load
        )

    def seconds(self, state: Annealing) -> Array:
        """Of all layers."""
        return state.seconds.sum() + self.times.shared(state.load.sum(0))


def _scores(goal: Goal, resident: Array, place_l: Array, from_l: Array, key: Array) -> Array:
    """Random numbers by which experts are chosen to move to a place: float32 [l, e]."""
    servers, num_layers, experts = resident.shape
    layer_l = jnp.arange(num_layers, dtype=jnp.int32)
    noise_key, token_key, which_key = jax.random.split(key, 3)
    everywhere = goal.sample.used.mean(0, keepdims=True)
    used = jnp.log(jnp.concatenate([goal.sample.used, everywhere]) + RARE)
    score_le = used[place_l, layer_l] - used[from_l, layer_l]
    score_le = score_le + jax.random.gumbel(noise_key, score_le.shape)
    # What a random token of the place misses comes first.
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
    resident: Array, score_le: Array, from_l: Array, to_l: Array, not_l: Array
) -> tuple[Array, Array]:
    """Moves the expert of each layer with the greatest score that can go.

    Args:
        resident: bool [n, l, e].
        score_le: float32 [l, e], of the experts.
        from_l, to_l: int32 [l], servers; their number: outside.
        not_l: int32 [l], an expert that may not.

    Returns:
        expert_l int32 [l], the number of experts where there is none; the placement after it.
    """
    servers, num_layers, experts = resident.shape
    layer_l = jnp.arange(num_layers, dtype=jnp.int32)
    outside = jnp.zeros((1, num_layers, experts), bool)
    held = jnp.concatenate([resident, outside])
    here_le = held[from_l, layer_l] | (from_l == servers)[:, None]
    # To outside goes a copy, but never the last.
    copies_le = resident.sum(0, dtype=jnp.int32)
    free_le = ~held[to_l, layer_l] & ((to_l < servers)[:, None] | (copies_le > 1))
    movable_le = here_le & free_le & (jnp.arange(experts, dtype=jnp.int32)[None] != not_l[:, None])
    score_le = jnp.where(movable_le, score_le, jnp.float32(-jnp.inf))
    expert_l = jnp.argmax(score_le, axis=1).astype(jnp.int32)
    expert_l = jnp.where(movable_le.any(1), expert_l, jnp.int32(experts))
    return expert_l, _put(resident, layer_l, expert_l, from_l, to_l)


def _put(resident: Array, layer_l: Array, expert_l: Array, from_l: Array, to_l: Array) -> Array:
    """One expert of each layer moved; none where a number is out of range."""
    resident = resident.at[from_l, layer_l, expert_l].set(False, mode="drop")
    return resident.at[to_l, layer_l, expert_l].set(True, mode="drop")


def _partners(draw_l: Array) -> Array:
    """Layers in random pairs, each the other's partner; an odd one is its own: int32 [l]."""
    num_layers = len(draw_l)
    order = jnp.argsort(draw_l).astype(jnp.int32)
    even = num_layers // 2 * 2
    swapped = jnp.concatenate([order[:even].reshape(-1, 2)[:, ::-1].reshape(-1), order[even:]])
    return jnp.zeros(num_layers, jnp.int32).at[order].set(swapped)


def _round(goal: Goal, key: Array, temperature: Array, state: Annealing) -> Annealing:
    """Proposes a change to every layer, or to every pair, and takes it or not."""
    servers, num_layers, experts = state.resident.shape
    draw_key, first_key, second_key = jax.random.split(key, 3)
    draw = jax.random.uniform(draw_key, (5, num_layers))
    paired_l, order_l, place_l, shift_l, luck_l = draw
    itself_l = jnp.arange(num_layers, dtype=jnp.int32)
    partner_l = jnp.where(paired_l[0] < PAIRED, _partners(order_l), itself_l)
    leader_l = jnp.minimum(itself_l, partner_l)

    # Two different places of each pair; the last one is outside.
    place_l = (place_l * (servers + 1)).astype(jnp.int32)
    other_l = (place_l + 1 + (shift_l * servers).astype(jnp.int32)) % (servers + 1)
    a_l, b_l = place_l[leader_l], other_l[leader_l]

    # The leader moves from a to b; back moves its partner, or itself where it is alone.
    leads_l, alone_l = leader_l == itself_l, partner_l == itself_l
    from_l, to_l = jnp.where(leads_l, a_l, b_l), jnp.where(leads_l, b_l, a_l)
    nothing_l = jnp.full(num_layers, experts, jnp.int32)
    score_le = _scores(goal, state.resident, to_l, from_l, first_key)
    first_l, resident = _half_move(state.resident, score_le, from_l, to_l, nothing_l)
    score_le = _scores(goal, resident, from_l, to_l, second_key)
    second_l, back = _half_move(resident, score_le, to_l, from_l, first_l)
    possible_l = (first_l < experts) & ((second_l < experts) | ~alone_l)
    resident = jnp.where(alone_l[:, None], back, resident)
    changed = goal.state(resident)

    def of_pair(own: Array) -> Array:
        """Sums of both partners."""
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
    """`anneal`, with numbers as arrays []."""
    free = goal._replace(move=jnp.float32(0))
    unit = jnp.maximum(free.state(resident).seconds.mean(), jnp.finfo(jnp.float32).tiny)
    # Moves are priced in the same unit.
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
        cost, self._seed = problem.cost, problem.seed
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
        """A placement of less predicted time, with as many experts on each server.

        Args:
            start: covers all experts.
            schedule: rounds and temperatures.
            previous: from where experts have to move; default: `start`.
            move_cost: what moving one expert counts, in mean layer times of the start.

        Returns:
            The placement, and the predicted seconds of a layer.
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
        return Goal(self._sample, self._times, before, jnp.float32(move_cost))


def _kept(problem: Problem, previous: Placement) -> Placement:
    """`previous` with its free slots filled, or what is close to it where it does not fit."""
    held_n = previous.resident.sum((1, 2))
    if (held_n > problem.capacities).any() or not previous.resident.any(0).all():
        return optimal(problem)
    with jax.enable_x64(True):
        arrays = (previous.resident, problem.counts, problem.capacities)
        return Placement(np.asarray(fill(*(jnp.asarray(array) for array in arrays))))


def _with_few_moves(problem: Problem, previous: Placement) -> Placement:
    """Of placements about as good, one that moves few experts.

    `previous` itself where it is one of them. Otherwise the best that annealing finds, which then
    settles nearby with a price on every move, the highest that keeps the time. It starts from
    `previous`, and as if there were none: a placement that was made for another workload lies in a
    valley of its own, and what is found from there can take twice the time.
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


def _afresh(problem: Problem, search: Search) -> tuple[Placement, float]:
    """The best that is found from where statistics count most, and from the best start."""
    problem = dataclasses.replace(problem, previous=None)
    starts = [(each, search.seconds(each)) for each in (optimal(problem), layers(problem))]
    best = min(starts, key=lambda each: each[1])
    found = [search.anneal(starts[0][0], SEARCH), search.anneal(best[0], REFINE)]
    return min((best, *found), key=lambda each: each[1])


def latency(problem: Problem) -> Placement:
    """The placement with the least predicted time of a layer, on a sample of routes.

    Beyond DanceMoE, whose objective is the number of remote calls: a step waits, in each layer, for
    links and devices, as its exchange has it (`Problem.cost`). Annealing from `optimal` and from
    `layers`, with all memory used, fits the placement to `problem.routes`, and to how many tokens
    each server has by its counts. Equal inputs, the seed included, give equal placements.

    Where `problem.previous` is given, placements within 1 % of the least time found count as equal,
    and one that moves few experts is taken: `previous` itself if it is among them.

    Worked example, of `LockStepCost.reference`: one layer of 4 experts, k = 1, servers of 3 slots
    and 2, one device each. Two of 3 tokens of both choose expert 0, the third of server 0 expert 1
    and of server 1 expert 2. With {0, 1, 3} and {0, 2} nothing leaves and each device runs half of
    the calls: 0.5. With {0, 1, 2} and {2, 3} server 1 sends 2/3 of a state per token, which server
    0 computes: 2/3 + 5/6 + 0.3 x 1/3 = 1.6.

    Args:
        problem: with routes; `place` asks `optimal` otherwise.
    """
    if problem.previous is not None:
        return _with_few_moves(problem, problem.previous)
    return _afresh(problem, Search(problem))[0]
