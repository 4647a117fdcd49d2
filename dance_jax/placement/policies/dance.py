"""`dance`: the two stages of DanceMoE / Prism (arXiv:2508.12851)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dance_jax.placement.core import Placement
from dance_jax.placement.policies.rounding import largest_remainder, ranks
from dance_jax.placement.problem import Problem

#: Entropies are rounded to this fraction of a nat, so that ties depend on no order of summation.
ENTROPY_UNIT = 2.0**-24


def entropy_units(counts_nle: jax.Array) -> jax.Array:
    """Shannon entropy of each server's and layer's counts in ENTROPY_UNIT: int64 [n, l].

    A layer without counts is taken to use all experts equally.
    """
    total_nl1 = counts_nle.sum(axis=2, keepdims=True)
    even = jnp.full_like(counts_nle, 1.0 / counts_nle.shape[2])
    share_nle = jnp.where(total_nl1 > 0, counts_nle / jnp.where(total_nl1 > 0, total_nl1, 1), even)
    log_nle = jnp.log(jnp.where(share_nle > 0, share_nle, 1))
    return jnp.round(-(share_nle * log_nle).sum(axis=2) / ENTROPY_UNIT).astype(jnp.int64)


def _layer_shares(capacity: jax.Array, entropy_l: jax.Array, experts: int) -> jax.Array:
    """Shares one server's slots among layers by entropy, at most `experts` each: int64 [l].

    A layer whose share exceeds `experts` gets `experts`, and the others share the rest again. If
    only layers without entropy are left, they share equally.
    """

    def rest(full_l: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Slots left for layers that are not full, and the weights to share them by."""
        weight_l = jnp.where(full_l, 0, entropy_l)
        weight_l = jnp.where(weight_l.sum() > 0, weight_l, (~full_l).astype(jnp.int64))
        return capacity - experts * full_l.sum(dtype=jnp.int64), weight_l

    def overflowing(full_l: jax.Array) -> jax.Array:
        left, weight_l = rest(full_l)
        return ~full_l & (left * weight_l >= experts * jnp.maximum(weight_l.sum(), 1))

    full_l = lax.while_loop(
        lambda full_l: overflowing(full_l).any(),
        lambda full_l: full_l | overflowing(full_l),
        jnp.zeros(entropy_l.shape, bool),
    )
    left, weight_l = rest(full_l)
    return jnp.where(full_l, experts, largest_remainder(left, weight_l))


def _cover_layers(
    slots_nl: jax.Array, capacities_n: jax.Array, experts: int, holders: int
) -> jax.Array:
    """Moves slots between a server's layers until all layers have enough in all: int64 [n, l].

    A layer needs holders * experts, and a server has use for `experts` of them. Slots move one at a
    time to the lowest layer that is short of slots. Each comes from the server with the largest
    capacity among those with room in that layer and slots in a layer with surplus, out of its layer
    with the largest surplus (ties: lowest server, lowest layer).

    There always is such a server: if each server with slots in a layer with surplus were full in
    the layer that is short, these would be fewer than `holders` servers, and their slots too few
    for a surplus.
    """
    memory_rank_n = ranks(-capacities_n)
    num_servers = capacities_n.shape[0]

    def surplus(slots_nl: jax.Array) -> jax.Array:
        return slots_nl.sum(axis=0) - holders * experts

    def move_one(slots_nl: jax.Array) -> jax.Array:
        surplus_l = surplus(slots_nl)
        short = jnp.argmax(surplus_l < 0)
        donor_nl = (slots_nl > 0) & (surplus_l > 0)[None, :]
        donor_nl = donor_nl & (slots_nl[:, short] < experts)[:, None]
        server = jnp.argmin(jnp.where(donor_nl.any(axis=1), memory_rank_n, num_servers))
        donor = jnp.argmax(jnp.where(donor_nl[server], surplus_l, 0))
        return slots_nl.at[server, short].add(1).at[server, donor].add(-1)

    return lax.while_loop(lambda slots_nl: (surplus(slots_nl) < 0).any(), move_one, slots_nl)


@jax.jit
def layer_counts(counts_nle: jax.Array, capacities_n: jax.Array, holders: int) -> jax.Array:
    """Stage 1: how many experts of each layer a server holds, int64 [n, l]; needs 64-bit mode.

    Server n's slots are shared among layers in proportion to the entropy of its counts, and left
    over slots by largest remainder. Then layers that could not be covered get slots from others.

    Args:
        counts_nle: float64 expert calls.
        capacities_n: int64 slots, at most l * e each and at least holders * l * e in all.
        holders: servers that must hold each expert.
    """
    experts = counts_nle.shape[2]
    entropy_nl = entropy_units(counts_nle)
    slots_nl = jax.vmap(_layer_shares, (0, 0, None))(capacities_n, entropy_nl, experts)
    return _cover_layers(slots_nl, capacities_n, experts, holders)


def _cover_experts(resident_ne: jax.Array, counts_ne: jax.Array, holders: int) -> jax.Array:
    """Swaps duplicates of one layer for experts on too few servers: bool [n, e].

    A duplicate is a copy of an expert with more than `holders`. One of its servers always lacks the
    expert that is short, because that one has fewer holders.
    """

    def swap_one(resident_ne: jax.Array) -> jax.Array:
        copies_e = resident_ne.sum(axis=0)
        duplicate_ne = resident_ne & (copies_e > holders)[None, :]
        lacks_ne = ~resident_ne & (copies_e < holders)[None, :]
        server = jnp.argmax(jnp.where(lacks_ne.any(axis=1), duplicate_ne.sum(axis=1), 0))
        used_e = counts_ne[server]
        drop = jnp.argmin(jnp.where(duplicate_ne[server], used_e, jnp.inf))
        take = jnp.argmax(jnp.where(lacks_ne[server], used_e, -1.0))
        return resident_ne.at[server, drop].set(False).at[server, take].set(True)

    def short(resident_ne: jax.Array) -> jax.Array:
        return (resident_ne.sum(axis=0) < holders).any()

    return lax.while_loop(short, swap_one, resident_ne)


@jax.jit
def assign(counts_nle: jax.Array, slots_nl: jax.Array, holders: int) -> jax.Array:
    """Stage 2: which experts each server holds, bool [n, l, e]; needs 64-bit mode.

    Every server takes the experts that it calls most in each layer. Then, while an expert has fewer
    than `holders`, the server with most duplicates in the layer, of those that lack such an expert,
    replaces the duplicate that it calls least by the one of these experts that it calls most (ties:
    lowest server, lowest expert). Duplicates are copies of experts with more than `holders`.

    Args:
        counts_nle: float64 expert calls.
        slots_nl: int64 experts to hold in each layer, at most e; every layer sums to at least
            holders * e.
        holders: servers that must hold each expert.
    """
    resident_nle = ranks(-counts_nle) < slots_nl[:, :, None]
    return jax.vmap(_cover_experts, (1, 1, None), 1)(resident_nle, counts_nle, holders)


def dance(problem: Problem) -> Placement:
    """The paper's placement: entropy shares slots among layers, calls choose the experts.

    Worked example: one layer of 4 experts, two servers with 2 slots, calls [9, 5, 1, 0] and
    [8, 6, 0, 1]. Both take experts 0 and 1. Experts 2 and 3 are on no server, and both servers have
    two duplicates, so server 0 replaces expert 1 by expert 2. Now both have one duplicate, so
    server 0 replaces expert 0 by expert 3: server 0 holds {2, 3}, server 1 {0, 1}.
    """
    with jax.enable_x64(True):
        counts_nle = jnp.asarray(problem.counts)
        slots_nl = layer_counts(counts_nle, jnp.asarray(problem.capacities), problem.holders)
        return Placement(np.asarray(assign(counts_nle, slots_nl, problem.holders)))
