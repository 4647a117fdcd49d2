"""`eplb`: DeepSeek's Expert Parallelism Load Balancer, also adapted to unequal servers.

`rebalance_experts` follows the published algorithm (github.com/deepseek-ai/EPLB) and gives its
results. `eplb` uses it if all servers are equal. Otherwise it applies the same two ideas, replicas
for the experts with most load and balanced packing, within each server's memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dance_jax.config import UserError
from dance_jax.placement.core import Placement
from dance_jax.placement.policies.packing import expert_load, pack
from dance_jax.placement.policies.rounding import ranks
from dance_jax.placement.problem import Problem


def _most_loaded(weight_e: jax.Array, count_e: jax.Array) -> jax.Array:
    """The expert with most load per replica, ties: lowest."""
    return jnp.argmax(weight_e / count_e.astype(weight_e.dtype))


def _replicate(weight_e: jax.Array, replicas: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Makes one replica of every expert, then more of the expert with most load per replica.

    Returns:
        int64 [r], the expert of each replica; int64 [r], the number of its earlier replicas;
        int64 [e], replicas of each expert.
    """

    def add_one(count_e: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        e = _most_loaded(weight_e, count_e)
        return count_e.at[e].add(1), (e, count_e[e])

    once_e = jnp.ones(weight_e.shape, jnp.int64)
    count_e, (more, rank) = lax.scan(add_one, once_e, None, length=replicas - len(weight_e))
    expert_r = jnp.concatenate([jnp.arange(len(weight_e), dtype=jnp.int64), more])
    return expert_r, jnp.concatenate([jnp.zeros_like(once_e), rank]), count_e


def _even_pack(weight_i: jax.Array, packs: int) -> jax.Array:
    """The position of each item if all packs take equally many: a permutation, int64 [i].

    First come the items of pack 0 in the order in which they were packed, then those of pack 1, and
    so on.
    """
    places = len(weight_i) // packs
    if places == 1:  # as in the published code, single items keep their order
        return jnp.arange(packs, dtype=jnp.int64)
    places_p = jnp.full(packs, places, jnp.int64)
    pack_i, rank_i = pack(weight_i, places_p, jnp.ones(packs, weight_i.dtype))
    return pack_i * places + rank_i


def _rebalance_layer(
    weight_e: jax.Array, replicas: int, groups: int, nodes: int, gpus: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Expert and rank of each slot, int64 [replicas] twice, and replicas of each, int64 [e]."""
    size = len(weight_e) // groups
    group_weight_g = weight_e.reshape(groups, size).sum(axis=1)
    first_g1 = (_even_pack(group_weight_g, nodes) * size)[:, None]
    # The position of each expert in order of nodes, and the expert at each position.
    position_e = (first_g1 + jnp.arange(size, dtype=jnp.int64)[None, :]).reshape(-1)
    expert_m = jnp.argsort(position_e)

    def fill_node(weight_m: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        local_r, rank_r, count_m = _replicate(weight_m, replicas // nodes)
        load_r = (weight_m / count_m.astype(weight_m.dtype))[local_r]
        order_r = jnp.argsort(_even_pack(load_r, gpus // nodes))
        return local_r[order_r], rank_r[order_r], count_m

    local_ar, rank_ar, count_am = jax.vmap(fill_node)(weight_e[expert_m].reshape(nodes, -1))
    expert_ar = jnp.take_along_axis(expert_m.reshape(nodes, -1), local_ar, axis=1)
    return expert_ar.reshape(-1), rank_ar.reshape(-1), count_am.reshape(-1)[position_e]


@functools.partial(jax.jit, static_argnames=("replicas", "groups", "nodes", "gpus"))
def _rebalance(
    weight_le: jax.Array, replicas: int, groups: int, nodes: int, gpus: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`_rebalance_layer` of every layer."""
    one_layer = functools.partial(
        _rebalance_layer, replicas=replicas, groups=groups, nodes=nodes, gpus=gpus
    )
    return jax.vmap(one_layer)(weight_le)


def _checked_weight(weight: np.ndarray) -> np.ndarray:
    weight_le = np.asarray(weight)
    if weight_le.ndim != 2 or 0 in weight_le.shape or weight_le.dtype.kind not in "iuf":
        raise UserError(
            f"rebalance_experts: weight is {weight_le.dtype} {weight_le.shape}; "
            "numbers [layers, experts] are needed"
        )
    with np.errstate(over="ignore"):
        weight_le = weight_le.astype(np.float32)
    if not np.isfinite(weight_le).all() or (weight_le < 0).any():
        raise UserError("rebalance_experts: every weight must be finite (float32) and at least 0")
    return weight_le


def _check_divisible(experts: int, replicas: int, groups: int, nodes: int, gpus: int) -> None:
    if min(replicas, groups, nodes, gpus) < 1:
        raise UserError(
            f"rebalance_experts: {replicas} replicas, {groups} groups, {nodes} nodes and "
            f"{gpus} gpus; each must be at least 1"
        )
    if replicas < experts:
        raise UserError(f"rebalance_experts: {replicas} replicas cannot hold {experts} experts")
    if replicas % gpus:
        raise UserError(f"rebalance_experts: {replicas} replicas do not divide into {gpus} gpus")
    if groups % nodes == 0 and experts % groups:
        raise UserError(f"rebalance_experts: {experts} experts do not divide into {groups} groups")
    if groups % nodes == 0 and gpus % nodes:
        raise UserError(f"rebalance_experts: {gpus} gpus do not divide into {nodes} nodes")


def rebalance_experts(
    weight: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Replicates and packs the experts of every layer so that all GPUs have about equal load.

    DeepSeek's EPLB (github.com/deepseek-ai/EPLB, `rebalance_experts`). If num_groups is a multiple
    of num_nodes (hierarchical policy), groups of consecutive experts are packed onto nodes. Each
    node has equally many replicas: one of each of its experts, and the others one by one of the
    expert with most load per replica. They are packed onto the node's GPUs. Otherwise (global
    policy) it is the same with one group and one node. Packing takes the heaviest first, each to
    the pack with least weight that has a free place.

    Weights are float32 as in the original. The original sorts without a rule for ties; here the
    lowest index goes first, among experts, replicas and packs. A GPU may get two replicas of an
    expert. If all weights of a layer (or node) are 0, all extra replicas are of its first expert.

    >>> expert, slots, count = rebalance_experts(np.array([[6, 4, 2]]), 4, 1, 1, 2)
    >>> expert.tolist(), slots.tolist(), count.tolist()
    ([[1, 2, 0, 0]], [[[2, 3], [0, -1], [1, -1]]], [[2, 1, 1]])

    Args:
        weight: [layers, experts], load of each expert, any unit.
        num_replicas: slots of a layer on all GPUs, a multiple of num_gpus.
        num_groups: groups of experts that are called together.
        num_nodes: machines with fast links inside.
        num_gpus: GPUs of all nodes together; slots are numbered GPU by GPU, node by node.

    Returns:
        physical_to_logical: int64 [layers, replicas], the expert in each slot.
        logical_to_physical: int64 [layers, experts, most replicas of an expert], its slots in the
            order in which its replicas were made, -1 after the last.
        replica_count: int64 [layers, experts].

    Raises:
        UserError: the weights are not a table of finite numbers of at least 0, there are fewer
            replicas than experts, or replicas do not divide into GPUs; with the hierarchical policy
            also if experts do not divide into groups or GPUs into nodes.
    """
    weight_le = _checked_weight(weight)
    layers, experts = weight_le.shape
    _check_divisible(experts, num_replicas, num_groups, num_nodes, num_gpus)
    groups, nodes = (num_groups, num_nodes) if num_groups % num_nodes == 0 else (1, 1)
    with jax.enable_x64(True):
        tables = _rebalance(jnp.asarray(weight_le), num_replicas, groups, nodes, num_gpus)
    expert_lr, rank_lr, count_le = (np.asarray(table) for table in tables)
    slot_lex = np.full((layers, experts, count_le.max()), -1, np.int64)
    slot_lex[np.arange(layers)[:, None], expert_lr, rank_lr] = np.arange(num_replicas)[None]
    return expert_lr, slot_lex, count_le


def _layer_slots(capacities_n: jax.Array, layers: int) -> jax.Array:
    """Shares all slots of each server evenly among the layers: int64 [n, l].

    The layers of a server differ by at most one slot, and so do the sums over servers: each
    server's odd slots go to the layers after those that got the previous server's.
    """
    odd_n1 = (capacities_n % layers)[:, None]
    first_n1 = jnp.cumsum(odd_n1, axis=0) - odd_n1
    layer_1l = jnp.arange(layers, dtype=jnp.int64)[None, :]
    extra_nl = (layer_1l - first_n1) % layers < odd_n1
    return capacities_n[:, None] // layers + extra_nl.astype(jnp.int64)


def _replica_counts(weight_e: jax.Array, slots_n: jax.Array) -> jax.Array:
    """Replicas of each expert, as many as slots, at most one per server with slots: int64 [e]."""
    most = (slots_n > 0).sum(dtype=jnp.int64)

    def add_one(_, count_e: jax.Array) -> jax.Array:
        e = _most_loaded(jnp.where(count_e < most, weight_e, -1.0), count_e)
        return count_e.at[e].add(1)

    once_e = jnp.ones(weight_e.shape, jnp.int64)
    return lax.fori_loop(0, slots_n.sum() - len(weight_e), add_one, once_e)


def _pack_replicas(weight_e: jax.Array, slots_n: jax.Array, devices_n: jax.Array) -> jax.Array:
    """Packs replicas onto servers with room, no expert twice onto one server: bool [n, e].

    Experts go in order of load per replica, most first, onto the servers with least load per device
    (ties: lowest expert, lowest server). If fewer servers have room than an expert has replicas, it
    goes onto all of these. There are as many slots as replicas, so even the last expert finds one.
    """
    count_e = _replica_counts(weight_e, slots_n)
    load_e = weight_e / count_e.astype(weight_e.dtype)

    def pack_expert(servers: tuple[jax.Array, jax.Array], e: jax.Array):
        load_n, room_n = servers
        lightness_n = jnp.where(room_n > 0, load_n / devices_n, jnp.inf)
        chosen_n = (ranks(lightness_n) < count_e[e]) & (room_n > 0)
        load_n = load_n + jnp.where(chosen_n, load_e[e], 0)
        return (load_n, room_n - chosen_n.astype(jnp.int64)), chosen_n

    order_e = jnp.argsort(-load_e, stable=True)
    start = jnp.zeros_like(devices_n), slots_n
    _, chosen_en = lax.scan(pack_expert, start, order_e)
    return chosen_en[jnp.argsort(order_e)].T


def _fill(resident_ne: jax.Array, weight_e: jax.Array, slots_n: jax.Array) -> jax.Array:
    """Fills free slots with the absent experts that have most load per replica: bool [n, e]."""

    def fill_server(copies_e: jax.Array, server: tuple[jax.Array, jax.Array]):
        resident_e, slots = server
        load_e = weight_e / copies_e.astype(weight_e.dtype)
        absent_rank_e = ranks(jnp.where(resident_e, jnp.inf, -load_e))
        more_e = absent_rank_e < slots - resident_e.sum(dtype=jnp.int64)
        return copies_e + more_e.astype(jnp.int64), resident_e | more_e

    copies_e = resident_ne.sum(axis=0, dtype=jnp.int64)
    return lax.scan(fill_server, copies_e, (resident_ne, slots_n))[1]


@jax.jit
def _place_unequal(
    counts_nle: jax.Array, capacities_n: jax.Array, devices_n: jax.Array
) -> jax.Array:
    """Replicates and packs within the memory of each server: bool [n, l, e]."""
    load_le, slots_nl = expert_load(counts_nle), _layer_slots(capacities_n, counts_nle.shape[1])
    resident_nle = jax.vmap(_pack_replicas, (0, 1, None), 1)(load_le, slots_nl, devices_n)
    return jax.vmap(_fill, (1, 0, 1), 1)(resident_nle, load_le, slots_nl)


@jax.jit
def _place_equal(expert_lr: jax.Array, counts_nle: jax.Array, capacities_n: jax.Array) -> jax.Array:
    """The experts in the slots of `rebalance_experts`, free memory filled: bool [n, l, e]."""
    servers, layers, experts = counts_nle.shape
    expert_e = jnp.arange(experts, dtype=jnp.int64)
    slot_nlr = jnp.moveaxis(expert_lr.reshape(layers, servers, -1), 1, 0)
    resident_nle = (slot_nlr[..., None] == expert_e[None, None, None, :]).any(axis=2)
    slots_nl = _layer_slots(capacities_n, layers)
    return jax.vmap(_fill, (1, 0, 1), 1)(resident_nle, expert_load(counts_nle), slots_nl)


def _equal_replicas(problem: Problem) -> int:
    """Replicas of a layer on all devices; 0 if servers are unequal or that is too few."""
    servers, layers, experts = problem.counts.shape
    if len(set(problem.capacities)) > 1 or len(set(problem.devices)) > 1:
        return 0
    gpus = int(problem.devices.sum())
    replicas = int(problem.capacities[0]) // layers * servers // gpus * gpus
    return replicas if replicas >= experts else 0


def eplb(problem: Problem) -> Placement:
    """Replicas for the experts with most load, packed so that all devices compute about the same.

    DeepSeek's EPLB; a baseline of DanceMoE (arXiv:2508.12851), whose authors adapted it to unequal
    servers without saying how. The load of an expert is its calls by all servers together; which
    server calls it does not matter.

    Equal servers (in memory and devices): `rebalance_experts`, global policy, with as many replicas
    per layer as all devices can hold equally. Two replicas of an expert on one server become one.

    Unequal servers, or too little memory for that: a server's slots are shared evenly among the
    layers. In each layer there are as many replicas as slots, made as in EPLB but at most one per
    server. They are packed, most load per replica first, onto the servers with least load per
    device that have room and do not hold the expert.

    In both cases slots that are still free get, server by server, the absent experts with most load
    per replica, so that all memory is used.

    Worked example: one layer of 4 experts with 12, 6, 5 and 4 calls; servers with 2 and 4 slots, 1
    and 2 devices. Of 6 replicas 4 are the experts, the fifth is of expert 0, which then has one
    for each server, and the sixth is of expert 1: loads per replica are 6, 3, 5 and 4. Expert 0
    goes to both servers (loads per device 6 and 3), 2 to server 1 (5.5), 3 to server 1 (7.5), and
    last 1 to both: server 0 holds {0, 1}, server 1 all.
    """
    replicas = _equal_replicas(problem)
    with jax.enable_x64(True):
        counts_nle, capacities_n = jnp.asarray(problem.counts), jnp.asarray(problem.capacities)
        if not replicas:
            devices_n = jnp.asarray(problem.devices, jnp.float64)
            return Placement(np.asarray(_place_unequal(counts_nle, capacities_n, devices_n)))
        load_le = np.asarray(expert_load(counts_nle))
        # Powers of two change no comparison, and keep large counts within float32.
        load_le = np.ldexp(load_le, -np.frexp(load_le.max(1, keepdims=True))[1])
        servers, gpus = len(problem.capacities), int(problem.devices.sum())
        expert_lr, _, _ = rebalance_experts(load_le, replicas, 1, servers, gpus)
        return Placement(np.asarray(_place_equal(jnp.asarray(expert_lr), counts_nle, capacities_n)))
