"""`smartmoe`: loads balanced by greedy assignment and swaps, after SmartMoE's placement part."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dance_jax.placement.core import Placement
from dance_jax.placement.policies.packing import expert_load, pack
from dance_jax.placement.policies.uniform import layer_quotas
from dance_jax.placement.problem import Problem

#: A swap must lower the larger load by this share; less may be rounding.
LEAST_GAIN = 1e-9


def _best_swap(
    load_e: jax.Array, owner_e: jax.Array, places_n: jax.Array, devices_n: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The swap between the most and the least loaded server that lowers the larger load most.

    Returns:
        The expert of the most loaded server, that of the least loaded one, and whether it pays.
    """
    load_n = jnp.zeros(devices_n.shape).at[owner_e].add(load_e) / devices_n
    most = jnp.argmax(load_n)
    least = jnp.argmin(jnp.where(places_n > 0, load_n, jnp.inf))
    moved_ee = load_e[:, None] - load_e[None, :]
    peak_ee = jnp.maximum(
        load_n[most] - moved_ee / devices_n[most], load_n[least] + moved_ee / devices_n[least]
    )
    pair_ee = (owner_e == most)[:, None] & (owner_e == least)[None, :] & (most != least)
    peak_ee = jnp.where(pair_ee, peak_ee, jnp.inf)
    give, take = jnp.unravel_index(jnp.argmin(peak_ee), peak_ee.shape)
    return give, take, peak_ee.min() < load_n[most] * (1 - LEAST_GAIN)


def _place_layer(load_e: jax.Array, places_n: jax.Array, devices_n: jax.Array) -> jax.Array:
    """Which server holds each expert of a layer: int64 [e]."""

    def swap(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        owner_e, swaps, _ = state
        give, take, pays = _best_swap(load_e, owner_e, places_n, devices_n)
        swapped_e = owner_e.at[give].set(owner_e[take]).at[take].set(owner_e[give])
        return jnp.where(pays, swapped_e, owner_e), swaps + 1, pays

    owner_e, _ = pack(load_e, places_n, devices_n)
    start = owner_e, jnp.int64(0), jnp.bool_(True)
    return lax.while_loop(lambda state: state[2] & (state[1] < len(load_e)), swap, start)[0]


@jax.jit
def _balanced(counts_nle: jax.Array, capacities_n: jax.Array, devices_n: jax.Array) -> jax.Array:
    """Every expert once, loads balanced layer by layer: bool [n, l, e]."""
    servers, layers, experts = counts_nle.shape
    load_le = expert_load(counts_nle)
    places_ln = layer_quotas(capacities_n, layers, experts).T

    def place_layer(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _place_layer(layer[0], layer[1], devices_n)

    # Not vmap: layers need unequally many swaps.
    owner_le = lax.map(place_layer, (load_le, places_ln))
    return owner_le[None] == jnp.arange(servers, dtype=jnp.int64)[:, None, None]


def smartmoe(problem: Problem) -> Placement:
    """Places every expert once, so that all devices compute about equally many calls.

    In every layer a server holds as many experts as under `uniform`. An expert's load is its calls
    by all servers together. Experts, most called first, each go to the server with least load per
    device that has a free place in the layer (ties: lowest expert, lowest server). Then the most
    and the least loaded server swap the pair of experts that lowers the larger of their loads per
    device most, as long as it gets lower, and at most as often as there are experts.

    After the placement part of SmartMoE (Zhai et al., USENIX ATC 2023), a baseline of DanceMoE. The
    greedy assignment is what its published code does at run time; the swaps go further in the same
    direction, and quotas and devices are for unequal servers. Like SmartMoE it considers only load,
    not which server calls an expert, and makes no replicas: memory beyond one copy of the model
    stays empty. It leaves out the search for a parallel training strategy, which is most of
    SmartMoE, and what SmartMoE does to keep experts in place.

    Worked example: one layer of 5 experts with 9, 8, 7, 6 and 5 calls, servers of one device with
    2 and 3 slots. Greedily 9 goes to server 0, 8 and 7 to server 1 (8 < 9), 6 to server 0
    (9 < 15), which is full, and 5 to server 1: loads 15 and 20. Swapping 8 for 6 makes 17 and 18,
    and no swap is better than that: server 0 holds experts 0 and 1, server 1 experts 2, 3 and 4.
    """
    with jax.enable_x64(True):
        resident_nle = _balanced(
            jnp.asarray(problem.counts),
            jnp.asarray(problem.capacities),
            jnp.asarray(problem.devices, jnp.float64),
        )
        return Placement(np.asarray(resident_nle))
