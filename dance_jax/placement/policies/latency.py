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

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dance_jax.placement.core import Placement
from dance_jax.placement.metrics import holders_mask
from dance_jax.placement.policies.dance import dance
from dance_jax.placement.policies.lockstep import (
    Sample,
    layer_times,
    locate,
    mask_dtype,
    relocate,
)
from dance_jax.placement.problem import Problem

#: Changes proposed to each layer.
ROUNDS = 6000
#: Of them, those that move slots between layers.
PAIRED = 1 / 3
#: Temperatures of the first and the last round, in mean layer times of the start.
HOT, COLD = 2e-2, 3e-4


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


@functools.partial(jax.jit, static_argnames="rounds")
def anneal(
    sample: Sample,
    holders_le: jax.Array,
    previous_le: jax.Array,
    move_cost: jax.Array,
    hot: jax.Array,
    cold: jax.Array,
    seed: jax.Array,
    rounds: int,
) -> tuple[jax.Array, jax.Array]:
    """A placement of less predicted time, with as many experts on each server.

    Args:
        sample: the routes and their costs.
        holders_le: bitmasks [layers, experts], where to start from.
        previous_le: bitmasks [layers, experts], from where experts must be moved.
        move_cost: float32 [], time of a layer that one expert moved is worth, in units of the
            mean layer time at the start.
        hot, cold: float32 [], temperatures of the first and last round, in the same unit.
        seed: int32 [], of all draws.
        rounds: changes to propose to each layer.

    Returns:
        The bitmasks [layers, experts], and their mean layer time, float32 [] (without the fixed
        part).
    """
    where = locate(sample, holders_le)
    seconds_l = layer_times(sample, where)
    unit = jnp.maximum(seconds_l.mean(), jnp.float32(np.finfo(np.float32).tiny))
    moved_l = lax.population_count(holders_le & ~previous_le).sum(axis=1, dtype=jnp.int32)
    start = State(holders_le, where, seconds_l / unit + move_cost * moved_l.astype(jnp.float32))
    key = jax.random.key(seed)

    def one(i: jax.Array, state: State) -> State:
        temperature = hot * (cold / hot) ** (i.astype(jnp.float32) / rounds)
        return _round(
            sample, previous_le, move_cost, unit, jax.random.fold_in(key, i), temperature, state
        )

    end = lax.fori_loop(0, rounds, one, start)
    return end.holders, layer_times(sample, end.where).mean()


def latency(problem: Problem) -> Placement:
    assert problem.routes is not None and problem.cost is not None
    num_servers, _, experts = problem.counts.shape
    dtype = mask_dtype(num_servers)
    sample = Sample.of(problem.routes, problem.cost, problem.token_weights, experts)
    start = jnp.asarray(holders_mask(dance(problem).resident).astype(dtype))
    holders_le, _ = anneal(
        sample,
        start,
        start,
        jnp.float32(0),
        jnp.float32(HOT),
        jnp.float32(COLD),
        jnp.int32(problem.seed),
        rounds=ROUNDS,
    )
    bit_n11 = (1 << np.arange(num_servers))[:, None, None]
    return Placement((np.asarray(holders_le)[None] & bit_n11) != 0)
