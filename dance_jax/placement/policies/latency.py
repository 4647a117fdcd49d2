"""`latency`: the placement whose lock-step layers are predicted to take the least time.

Annealing (Kirkpatrick et al. 1983) on `lockstep.layer_times`, all layers at once: a layer's time
depends on its own experts only, so every round proposes one change for each layer and accepts or
refuses each on its own. What ties layers together is the memory of a server, so in some rounds
layers are paired, and one gets a slot that the other gives.

A change consists of two half moves between the same two places, there and back, in one layer or in
two. A place is a server or `outside`, where copies come from and go to: a half move from server a
to server b moves an expert, from a to outside drops a copy that is not the last, and from outside
to b adds one. So slots per server stay what they are and every expert stays somewhere.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dance_jax.config import UserError
from dance_jax.placement.core import Placement
from dance_jax.placement.policies.dance import dance
from dance_jax.placement.policies.lockstep import (
    Sample,
    layer_times,
    locate,
    relocate,
)
from dance_jax.placement.policies.optimal import optimal
from dance_jax.placement.policies.rounding import fill
from dance_jax.placement.problem import Problem
from dance_jax.placement.visit import WORD, masks

#: A round takes time with the square of the servers; sets of them are one word here.
MOST_SERVERS = WORD
#: Of all rounds, those that move slots between layers.
PAIRED = 1 / 3
#: Placements whose times differ by less are equals: the one that moves fewer experts is taken.
TOLERANCE = 0.01
#: What a move costs in search of it, in TOLERANCE / moves: with 1 all moves cost what they may.
MOVE_PRICES = (12.0, 8.0, 4.0)


class Schedule(NamedTuple):
    """How long and how wild an annealing is."""

    #: Changes proposed to each layer.
    rounds: int
    #: Temperatures of the first and the last round, in mean layer times of the start.
    hot: float
    cold: float


#: From any start to a good placement.
SEARCH = Schedule(8000, 1e-2, 3e-4)
#: Within the neighbourhood of a good placement.
SETTLE = Schedule(4000, 3e-4, 3e-5)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["holders", "where", "seconds"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class State:
    """Where an annealing stands."""

    #: Bitmasks of servers [layers, experts]: the placement.
    holders: jax.Array
    #: What `locate` gives for it.
    where: jax.Array
    #: float32 [layers]: predicted time of each layer, in units of the start's mean.
    seconds: jax.Array


def _half_move(
    draw_l: jax.Array, holders_le: jax.Array, from_l: jax.Array, to_l: jax.Array, not_l: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A random expert of each layer that can go from one place to another.

    Args:
        draw_l: float32 [layers], uniform in [0, 1): which of the experts that can go.
        holders_le: bitmasks [layers, experts].
        from_l, to_l: bitmasks [layers] of one server; 0: outside.
        not_l: int32 [layers], an expert that may not.

    Returns:
        expert_l int32 [layers], the number of experts where there is none; and its new bitmask.
    """
    experts = holders_le.shape[1]
    from_l1, to_l1 = from_l[:, None], to_l[:, None]
    here_le = ((holders_le & from_l1) != 0) | (from_l1 == 0)
    # To outside goes a copy, but never the last.
    free_le = ((holders_le & to_l1) == 0) & ((to_l1 != 0) | ((holders_le & ~from_l1) != 0))
    allowed_le = jnp.arange(experts, dtype=jnp.int32)[None, :] != not_l[:, None]
    movable_le = here_le & free_le & allowed_le
    upto_le = jnp.cumsum(movable_le, axis=1, dtype=jnp.int32)
    rank_l = (draw_l * upto_le[:, -1].astype(jnp.float32)).astype(jnp.int32)
    expert_l = jnp.argmax(upto_le > rank_l[:, None], axis=1).astype(jnp.int32)
    now_l = jnp.take_along_axis(holders_le, expert_l[:, None], axis=1)[:, 0]
    expert_l = jnp.where(upto_le[:, -1] > 0, expert_l, jnp.int32(experts))
    return expert_l, (now_l & ~from_l) | to_l


def _put(holders_le: jax.Array, expert_l: jax.Array, mask_l: jax.Array) -> jax.Array:
    """Another bitmask for one expert of each layer; none where its number is out of range."""
    layer_l = jnp.arange(holders_le.shape[0], dtype=jnp.int32)
    return holders_le.at[layer_l, expert_l].set(mask_l, mode="drop")


def _partners(draw_l: jax.Array) -> jax.Array:
    """Layers in random pairs, each the other's partner; an odd one is its own: int32 [layers]."""
    layers = len(draw_l)
    order = jnp.argsort(draw_l).astype(jnp.int32)
    even = layers // 2 * 2
    swapped = jnp.concatenate([order[:even].reshape(-1, 2)[:, ::-1].reshape(-1), order[even:]])
    return jnp.zeros(layers, jnp.int32).at[order].set(swapped)


def _round(
    sample: Sample,
    previous_le: jax.Array,
    move_cost: jax.Array,
    unit: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    state: State,
) -> State:
    """Proposes a change to every layer, or to every pair, and takes it or not."""
    layers, experts = state.holders.shape
    dtype, num_servers = state.holders.dtype, sample.num_servers
    # One call draws everything: each would cost more than the draws.
    draw = jax.random.uniform(key, (7, layers))
    paired_l, order_l, place_l, shift_l, first_draw_l, second_draw_l, luck_l = draw
    itself_l = jnp.arange(layers, dtype=jnp.int32)
    partner_l = jnp.where(paired_l[0] < PAIRED, _partners(order_l), itself_l)
    leader_l = jnp.minimum(itself_l, partner_l)

    # Two different places of each pair; the last one is outside.
    place_l = (place_l * (num_servers + 1)).astype(jnp.int32)
    other_l = (place_l + 1 + (shift_l * num_servers).astype(jnp.int32)) % (num_servers + 1)
    bit_n = jnp.asarray([1 << n for n in range(num_servers)] + [0], dtype)
    a_l, b_l = bit_n[place_l][leader_l], bit_n[other_l][leader_l]

    # The leader moves from a to b; back moves its partner, or itself where it is alone.
    leads_l, alone_l = leader_l == itself_l, partner_l == itself_l
    nothing_l = jnp.full(layers, experts, jnp.int32)
    from_l, to_l = jnp.where(leads_l, a_l, b_l), jnp.where(leads_l, b_l, a_l)
    first_l, first_mask_l = _half_move(first_draw_l, state.holders, from_l, to_l, nothing_l)
    holders_le = _put(state.holders, first_l, first_mask_l)
    second_l, second_mask_l = _half_move(second_draw_l, holders_le, to_l, from_l, first_l)
    possible_l = (first_l < experts) & ((second_l < experts) | ~alone_l)
    second_l = jnp.where(alone_l, second_l, nothing_l)
    holders_le = _put(holders_le, second_l, second_mask_l)

    where = relocate(sample, state.where, first_l, first_mask_l)
    where = relocate(sample, where, second_l, second_mask_l)
    moved_l = lax.population_count(holders_le & ~previous_le).sum(axis=1, dtype=jnp.int32)
    seconds_l = layer_times(sample, where) / unit + move_cost * moved_l.astype(jnp.float32)

    gain_l = state.seconds - seconds_l
    gain_l = gain_l + jnp.where(alone_l, jnp.float32(0), gain_l[partner_l])
    luck_l = jnp.log(luck_l[leader_l]) * temperature
    take_l = possible_l & possible_l[partner_l] & (luck_l < gain_l)
    return State(
        jnp.where(take_l[:, None], holders_le, state.holders),
        jnp.where(take_l[None, None, :, None], where, state.where),
        jnp.where(take_l, seconds_l, state.seconds),
    )


@jax.jit
def _anneal(
    sample: Sample,
    holders_le: jax.Array,
    previous_le: jax.Array,
    move_cost: jax.Array,
    rounds: jax.Array,
    hot: jax.Array,
    cold: jax.Array,
    seed: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`anneal`, with the placement as bitmasks [layers, experts] and numbers as arrays []."""
    where = locate(sample, holders_le)
    seconds_l = layer_times(sample, where)
    unit = jnp.maximum(seconds_l.mean(), jnp.float32(np.finfo(np.float32).tiny))
    moved_l = lax.population_count(holders_le & ~previous_le).sum(axis=1, dtype=jnp.int32)
    start = State(holders_le, where, seconds_l / unit + move_cost * moved_l.astype(jnp.float32))
    key = jax.random.key(seed)

    def one(i: jax.Array, state: State) -> State:
        done = i.astype(jnp.float32) / rounds.astype(jnp.float32)
        temperature = hot * (cold / hot) ** done
        return _round(
            sample, previous_le, move_cost, unit, jax.random.fold_in(key, i), temperature, state
        )

    end = lax.fori_loop(0, rounds, one, start)
    return end.holders, layer_times(sample, end.where).mean()


def anneal(
    sample: Sample,
    start: Placement,
    schedule: Schedule,
    seed: int,
    previous: Placement | None = None,
    move_cost: float = 0.0,
) -> tuple[Placement, float]:
    """A placement of less predicted time, with as many experts on each server.

    Args:
        sample: the routes and their costs.
        start: covers all experts.
        schedule: rounds and temperatures.
        seed: of all draws.
        previous: from where experts have to move; default: `start`.
        move_cost: what moving one expert counts, in mean layer times of the start.

    Returns:
        The placement, and the mean time of its layers on the sample, without the fixed part.
    """
    end, seconds = _anneal(
        sample,
        _masks(start),
        _masks(start if previous is None else previous),
        jnp.float32(move_cost),
        jnp.int32(schedule.rounds),
        jnp.float32(schedule.hot),
        jnp.float32(schedule.cold),
        jnp.int32(seed),
    )
    bit_n11 = np.left_shift(1, np.arange(sample.num_servers))[:, None, None]
    return Placement((np.asarray(end)[None] & bit_n11) != 0), float(seconds)


def _masks(placement: Placement) -> jax.Array:
    """Who holds each expert: bitmasks [layers, experts]."""
    return jnp.asarray(masks(placement.resident)[0])


def _kept(problem: Problem, previous: Placement) -> Placement:
    """`previous` with its free slots filled, or what is close to it where it does not fit."""
    held_n = previous.resident.sum((1, 2))
    if (held_n > problem.capacities).any() or not previous.resident.any(0).all():
        return optimal(problem)
    with jax.enable_x64(True):
        arrays = (previous.resident, problem.counts, problem.capacities)
        return Placement(np.asarray(fill(*(jnp.asarray(array) for array in arrays))))


def _with_few_moves(problem: Problem, sample: Sample, previous: Placement) -> Placement:
    """Of placements about as good, one that moves few experts.

    `previous` itself where it is one of them. Otherwise the best that annealing finds, which then
    settles nearby with a price on every move, the highest that keeps the time. It starts from
    `previous`, and as if there were none: a placement that was made for another workload lies in a
    valley of its own, and what is found from there can take twice the time.
    """
    start = _kept(problem, previous)
    stays = float(layer_times(sample, locate(sample, _masks(start))).mean())
    found = [anneal(sample, each, SEARCH, problem.seed) for each in (start, dance(problem))]
    enough = min(seconds for _, seconds in found) * (1 + TOLERANCE)
    if stays <= enough:
        return start
    best = min(
        (placement for placement, seconds in found if seconds <= enough),
        key=lambda placement: placement.moved(previous),
    )
    allowance = TOLERANCE * problem.counts.shape[1] / max(best.moved(previous), 1)
    for price in MOVE_PRICES:
        near, seconds = anneal(
            sample, best, SETTLE, problem.seed, previous=previous, move_cost=price * allowance
        )
        if seconds <= enough and near.moved(previous) < best.moved(previous):
            return near
    return best


def latency(problem: Problem) -> Placement:
    """The placement with the least predicted time of a lock-step layer, on a sample of routes.

    Beyond DanceMoE, whose objective is the number of remote calls: a step waits for the busiest
    link and the busiest device of every layer (`Traffic.layer_time`). Annealing from `dance`, with
    all memory used, fits the placement to `problem.routes`, `problem.cost` and to how many tokens
    each server has by its counts. Equal inputs, the seed included, give equal placements.

    Where `problem.previous` is given, placements within 1 % of the least time found count as equal,
    and one that moves few experts is taken: `previous` itself if it is among them.

    Worked example: one layer of 4 experts, k = 1, servers of 3 slots and 2, one device each. Two of
    3 tokens of both choose expert 0, the third of server 0 expert 1 and of server 1 expert 2. With
    {0, 1, 3} and {0, 2} nothing leaves and each device runs half of the calls: 0.5 in the units of
    `Cost.reference`. With {0, 1, 2} and {2, 3} server 1 sends 2/3 of a state per token, which
    server 0 computes: 2/3 + 5/6 + 0.3 x 1/3 = 1.6.

    Args:
        problem: with routes and at most MOST_SERVERS servers; `place` asks `optimal` otherwise.
    """
    if problem.routes is None or problem.cost is None:
        raise UserError("latency: routes are needed; with counts alone use optimal")
    if len(problem.routes) > MOST_SERVERS:
        raise UserError(
            f"latency: {len(problem.routes)} servers, at most {MOST_SERVERS}; use optimal"
        )
    sample = Sample.of(problem.routes, problem.cost, problem.token_weights, problem.counts.shape[2])
    if problem.previous is not None:
        return _with_few_moves(problem, sample, problem.previous)
    return anneal(sample, dance(problem), SEARCH, problem.seed)[0]
