"""redundance, layers, smartmoe and eplb: what each promises beyond the invariants of all policies,
and against plain readings of their descriptions."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dance_jax.config import UserError
from dance_jax.placement.policies import packing, place
from dance_jax.placement.policies.eplb import rebalance_experts
from dance_jax.placement.policies.packing import pack
from tests.placement.cases import draw_capacities

#: Servers, layers, experts; every shape compiles each policy once.
SHAPES = [(3, 4, 8), (4, 2, 6)]
quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def problems(draw):
    """Whole counts, of which sums are exact, with and without ties, on unequal servers."""
    servers, layers, experts = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(seeds))
    counts = rng.integers(0, draw(st.sampled_from([1, 3, 2**30])), (servers, layers, experts))
    total = layers * experts
    capacities = np.minimum(draw_capacities(draw, rng, servers, total), total)
    return counts, capacities, rng.integers(1, 4, servers)


def plain_load(counts):
    """Calls of each expert by all servers, [layers, experts]; layers without any count the same."""
    load = counts.sum(0).astype(float)
    return np.where(load.any(1, keepdims=True), load, 1.0)


# redundance


@quick
@given(problems(), seeds)
def test_redundance_is_uniform_and_fills_memory(problem, seed):
    counts, capacities, _ = problem
    uniform = place("uniform", counts, capacities).resident
    resident = place("redundance", counts, capacities, seed=seed).resident
    assert (resident | ~uniform).all()
    assert (resident.sum((1, 2)) == capacities).all()


def test_redundance_draws_evenly_and_by_seed():
    counts, capacities = np.zeros((3, 4, 8)), [10, 10, 20]
    drawn = [place("redundance", counts, capacities, seed=seed) for seed in range(200)]
    assert drawn[0] == place("redundance", counts, capacities, seed=0)
    assert drawn[0] != drawn[1]
    # No two servers draw alike, nor does the drawing depend on counts.
    assert drawn[0] == place("redundance", counts + np.arange(8), capacities, seed=0)
    replicas = ~place("uniform", counts, capacities).resident
    for n, (free, absent) in enumerate([(2, 24), (2, 24), (4, 16)]):
        often = np.sum([d.resident[n] for d in drawn], axis=0)[replicas[n]]
        mean, share = 200 * free / absent, free / absent
        assert often.sum() == 200 * free
        assert abs(often - mean).max() < 5 * np.sqrt(200 * share * (1 - share))


def test_redundance_of_the_reference_set_up():
    counts, capacities = np.zeros((3, 24, 32)), [253, 253, 506]
    more = place("redundance", counts, capacities).resident
    more = more & ~place("uniform", counts, capacities).resident
    assert more.sum((1, 2)).tolist() == [61, 61, 122]


# layers


@quick
@given(problems())
def test_layers_are_windows_that_fill_memory(problem):
    counts, capacities, _ = problem
    resident = place("layers", counts, capacities).resident.reshape(len(capacities), -1)
    assert (resident.sum(1) == capacities).all()
    # Round the whole model each server begins at most once.
    begins = resident & ~np.roll(resident, 1, axis=1)
    assert (begins.sum(1) <= 1).all()


def test_layers_begin_with_whole_layers_where_memory_allows():
    counts = np.zeros((3, 4, 8))
    # Cuts at 11 and 21. Layer 1 begins at 8, from where memory reaches 20; the last 13 slots must
    # begin at 19 or later, so inside layer 2.
    held = place("layers", counts, [12, 12, 13]).resident
    assert held.sum(2).tolist() == [[8, 4, 0, 0], [0, 8, 4, 0], [1, 0, 4, 8]]
    # No room to choose: cut where memory ends.
    held = place("layers", counts, [11, 11, 10]).resident
    assert held.sum(2).tolist() == [[8, 3, 0, 0], [0, 5, 6, 0], [0, 0, 2, 8]]
    # As many layers each where servers are equal.
    held = place("layers", counts[:2], [16, 16]).resident
    assert held.sum(2).tolist() == [[8, 8, 0, 0], [0, 0, 8, 8]]


def test_layers_of_the_reference_set_up():
    held = place("layers", np.zeros((3, 24, 32)), [253, 253, 506]).resident
    want = np.zeros((3, 24), int)
    want[0, :8] = [32] * 7 + [29]
    want[1, 6:14] = [32] * 7 + [29]
    want[2, 12:] = 32
    want[2, :4] = [32, 32, 32, 26]
    assert (held.sum(2) == want).all()
    assert held[0, 7, :29].all() and held[2, 3, :26].all()


# smartmoe


def plain_greedy(load, places, devices):
    """Which server gets each expert of a layer, heaviest first to the least loaded with a place."""
    owner, total = np.full(len(load), -1), np.zeros(len(places))
    for e in sorted(range(len(load)), key=lambda e: (-load[e], e)):
        free = [n for n in range(len(places)) if (owner == n).sum() < places[n]]
        owner[e] = min(free, key=lambda n: (total[n] / devices[n], n))
        total[owner[e]] += load[e]
    return owner


def per_device(load, owner, devices):
    return np.bincount(owner, load, len(devices)) / devices


@quick
@given(problems())
def test_smartmoe_balances_at_least_as_well_as_greedy(problem):
    counts, capacities, devices = problem
    resident = place("smartmoe", counts, capacities, devices=devices).resident
    places = place("uniform", counts, capacities).resident.sum(2)
    assert (resident.sum(0) == 1).all()
    assert (resident.sum(2) == places).all()
    for load, owner, room in zip(plain_load(counts), resident.argmax(0), places.T, strict=True):
        greedy = per_device(load, plain_greedy(load, room, devices), devices).max()
        loads = per_device(load, owner, devices)
        assert loads.max() <= greedy * (1 + 1e-12)
        most = loads.argmax()
        least = np.where(room > 0, loads, np.inf).argmin()
        for give in np.flatnonzero(owner == most) if most != least else ():
            for take in np.flatnonzero(owner == least):
                swapped = owner.copy()
                swapped[[give, take]] = least, most
                pair = per_device(load, swapped, devices)[[most, least]]
                assert pair.max() >= loads.max() * (1 - 1e-8)


def test_smartmoe_worked_example():
    resident = place("smartmoe", np.array([[[9, 8, 7, 6, 5]], [[0] * 5]]), [2, 3]).resident
    assert resident.astype(int).tolist() == [[[1, 1, 0, 0, 0]], [[0, 0, 1, 1, 1]]]


def test_smartmoe_gives_more_devices_more_calls():
    counts = np.random.default_rng(0).gamma(1.0, size=(3, 4, 8))
    resident = place("smartmoe", counts, [11, 11, 11], devices=[1, 1, 6]).resident
    loads = (resident * counts.sum(0)).sum(2)
    assert (loads[2] > loads[:2]).all()


jitted_pack = jax.jit(pack)


@quick
@given(st.integers(1, 4), seeds)
def test_pack_is_greedy(largest, seed):
    rng = np.random.default_rng(seed)
    weights, places = rng.integers(0, largest, 7).astype(float), rng.multinomial(9, [0.4, 0.3, 0.3])
    devices = rng.integers(1, 3, 3).astype(float)
    with jax.enable_x64(True):
        packs, ranks = jitted_pack(jnp.asarray(weights), jnp.asarray(places), jnp.asarray(devices))
    assert (np.asarray(packs) == plain_greedy(weights, places, devices)).all()
    for p in range(3):
        inside = np.flatnonzero(np.asarray(packs) == p)
        # The heaviest came first.
        order = inside[np.argsort(-weights[inside], kind="stable")]
        assert np.asarray(ranks)[order].tolist() == list(range(len(order)))


# eplb: the published function

#: Layers, experts, replicas, groups, nodes, GPUs: hierarchical, one slot a GPU, global, one node.
REBALANCINGS = [(2, 12, 16, 4, 2, 8), (1, 6, 6, 6, 3, 6), (2, 7, 12, 7, 2, 4), (2, 4, 12, 2, 1, 3)]
PUBLISHED = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def plain_packs(weights, packs):
    """Items of each pack, in the order in which they were packed."""
    places = len(weights) // packs
    if places == 1:
        return [[i] for i in range(packs)]
    held, total = [[] for _ in range(packs)], np.zeros(packs, np.float32)
    for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        p = min((p for p in range(packs) if len(held[p]) < places), key=lambda p: (total[p], p))
        held[p].append(i)
        total[p] += weights[i]
    return held


def plain_rebalance(weights, replicas, groups, nodes, gpus):
    """The expert in every slot of a layer."""
    if groups % nodes:
        groups = nodes = 1
    weights = np.asarray(weights, np.float32)
    members = np.arange(len(weights)).reshape(groups, -1)
    slots = []
    for node in plain_packs([weights[m].sum() for m in members], nodes):
        experts = [e for group in node for e in members[group]]
        made = list(experts)
        while len(made) < replicas // nodes:
            loads = [weights[e] / np.float32(made.count(e)) for e in experts]
            made.append(experts[int(np.argmax(loads))])
        loads = [weights[e] / np.float32(made.count(e)) for e in made]
        slots += [made[i] for gpu in plain_packs(loads, gpus // nodes) for i in gpu]
    return slots


def test_eplb_published_example():
    expert, slots, count = rebalance_experts(PUBLISHED, 16, 4, 2, 8)
    assert expert.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert (expert.shape, slots.shape, count.shape) == ((2, 16), (2, 12, 2), (2, 12))
    assert count[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert sorted(slots[0, 5].tolist()) == [0, 2] and slots[0, 0].tolist() == [12, -1]


@quick
@given(st.sampled_from(REBALANCINGS), st.sampled_from([1, 4, 1000]), seeds)
def test_rebalance_experts_is_the_published_algorithm(sizes, largest, seed):
    layers, experts, replicas, groups, nodes, gpus = sizes
    weights = np.random.default_rng(seed).integers(0, largest, (layers, experts))
    expert, slots, count = rebalance_experts(weights, replicas, groups, nodes, gpus)
    assert expert.tolist() == [
        plain_rebalance(row, replicas, groups, nodes, gpus) for row in weights
    ]
    assert (count >= 1).all() and (count.sum(1) == replicas).all()
    assert slots.shape == (layers, experts, count.max())
    assert ((slots >= 0).sum(2) == count).all()
    for layer in range(layers):
        # All slots once, each in the row of its own expert, and -1 after the last.
        assert sorted(slots[layer][slots[layer] >= 0]) == list(range(replicas))
        for e in range(experts):
            own = slots[layer, e, : count[layer, e]]
            assert (expert[layer, own] == e).all()


@pytest.mark.parametrize(
    ("weights", "sizes", "message"),
    [
        (PUBLISHED[0], (16, 4, 2, 8), r"weight is int64 \(12,\)"),
        (PUBLISHED[:, :0], (16, 4, 2, 8), r"weight is int64 \(2, 0\)"),
        (PUBLISHED.astype(str), (16, 4, 2, 8), "numbers"),
        (-PUBLISHED, (16, 4, 2, 8), "at least 0"),
        (PUBLISHED * np.nan, (16, 4, 2, 8), "finite"),
        (PUBLISHED * 1e300, (16, 4, 2, 8), "finite"),
        (PUBLISHED, (16, 4, 0, 8), "0 nodes .* at least 1"),
        (PUBLISHED, (8, 4, 2, 8), "8 replicas cannot hold 12 experts"),
        (PUBLISHED, (15, 4, 2, 8), "15 replicas do not divide into 8 gpus"),
        (PUBLISHED, (16, 8, 2, 8), "12 experts do not divide into 8 groups"),
        (PUBLISHED, (18, 3, 3, 2), "2 gpus do not divide into 3 nodes"),
    ],
)
def test_rebalance_experts_refuses(weights, sizes, message):
    with pytest.raises(UserError, match=message):
        rebalance_experts(weights, *sizes)


# eplb: the policy


def plain_unequal(load, slots, devices):
    """Who holds what of a layer, bool [servers, experts]: replicas, packing, free slots."""
    count = np.ones(len(load), int)
    while count.sum() < slots.sum():
        count[np.where(count < (slots > 0).sum(), load / count, -1).argmax()] += 1
    held, total = np.zeros((len(slots), len(load)), bool), np.zeros(len(slots))
    for e in sorted(range(len(load)), key=lambda e: (-load[e] / count[e], e)):
        free = [n for n in range(len(slots)) if held[n].sum() < slots[n]]
        for n in sorted(free, key=lambda n: (total[n] / devices[n], n))[: count[e]]:
            held[n, e] = True
            total[n] += load[e] / count[e]
    for n in range(len(slots)):
        copies = held.sum(0)
        absent = [e for e in range(len(load)) if not held[n, e]]
        more = sorted(absent, key=lambda e: (-load[e] / copies[e], e))
        held[n, more[: slots[n] - held[n].sum()]] = True
    return held


#: 14 slots a layer, 4 of them replicas of expert 0 and 1 of expert 5, but servers 0 and 1 have room
#: for every expert: where replicas cannot go, slots are filled.
LOPSIDED = (
    np.broadcast_to([900, 90, 9, 9, 1, 1], (4, 2, 6)),
    np.array([12, 12, 2, 2]),
    np.ones(4, int),
)


@example(LOPSIDED)
@quick
@given(problems())
def test_eplb_on_unequal_servers(problem):
    counts, capacities, devices = problem
    devices = np.append(devices[:-1], 4)  # never equal
    resident = place("eplb", counts, capacities, devices=devices).resident
    assert (resident.sum((1, 2)) == capacities).all()
    slots = resident.sum(2)
    # Shared evenly by the layers, on every server and over all.
    assert np.ptp(slots, axis=1).max() <= 1 and np.ptp(slots.sum(0)) <= 1
    for layer, load in enumerate(plain_load(counts)):
        want = plain_unequal(load, slots[:, layer], devices)
        assert (resident[:, layer] == want).all()


@pytest.mark.parametrize(("capacity", "devices"), [(19, 1), (32, 2)])
def test_eplb_on_equal_servers_is_rebalance_experts(capacity, devices):
    counts = np.random.default_rng(0).geometric(0.01, (4, 4, 8))
    counts[:, 0, 1:] = 0  # of experts 1 to 7 one replica each, the others of expert 0
    resident = place("eplb", counts, [capacity] * 4, devices=[devices] * 4).resident
    replicas = capacity // 4 * 4
    expert, _, _ = rebalance_experts(counts.sum(0), replicas, 1, 4, 4 * devices)
    by_rule = np.zeros(counts.shape, bool)
    for layer in range(4):
        by_rule[np.repeat(range(4), replicas // 4), layer, expert[layer]] = True
    assert (resident | ~by_rule).all()
    large = place("eplb", counts * 2.0**900, [capacity] * 4, devices=[devices] * 4)
    assert (large.resident == resident).all()
    # What two replicas on one server leave free is used.
    assert by_rule.sum() < 4 * capacity
    assert (resident.sum((1, 2)) == capacity).all()


def test_eplb_on_equal_servers_with_tight_memory():
    # Two slots a layer and server would be 6 of 8 experts, so the layers get unequally many.
    counts = np.random.default_rng(0).integers(0, 9, (3, 4, 8))
    resident = place("eplb", counts, [11, 11, 11]).resident
    assert resident.any(0).all() and resident.sum((1, 2)).tolist() == [11, 11, 11]


def test_eplb_worked_example():
    counts = np.array([[[12, 0, 5, 0]], [[0, 6, 0, 4]]])
    resident = place("eplb", counts, [2, 4], devices=[1, 2]).resident
    assert resident.astype(int).tolist() == [[[1, 1, 0, 0]], [[1, 1, 1, 1]]]


def test_eplb_balances_better_than_uniform():
    """Skewed loads: the busiest device has fewer calls, replicas of an expert sharing them."""
    busiest = {"uniform": [], "eplb": []}
    for seed in range(20):
        counts = np.random.default_rng(seed).gamma(0.3, size=(3, 4, 8))
        for policy, largest in busiest.items():
            resident = place(policy, counts, [11, 11, 22], devices=[1, 1, 2]).resident
            calls = (counts.sum(0) / resident.sum(0) * resident).sum(2)
            largest.append((calls / np.array([[1], [1], [2]])).max(0))
    assert np.mean(busiest["eplb"]) < 0.8 * np.mean(busiest["uniform"])


# all


@pytest.mark.parametrize(
    ("policy", "capacities", "devices"),
    [
        # On equal servers a swap and its mirror image tie, and the lower expert decides.
        ("smartmoe", [10, 10, 22], [1, 2, 3]),
        ("eplb", [10, 10, 22], [1, 1, 2]),
        ("eplb", [19] * 4, [1] * 4),
    ],
)
def test_names_of_experts_do_not_matter(policy, capacities, devices):
    shape = len(capacities), 4, 8
    for seed in range(10):
        rng = np.random.default_rng(seed)
        counts = rng.gamma(0.5, size=shape)
        names = np.argsort(rng.random(shape[1:]), axis=1)
        renamed = np.take_along_axis(counts, names[None], axis=2)
        resident = place(policy, counts, capacities, devices=devices).resident
        want = np.take_along_axis(resident, names[None], axis=2)
        assert (place(policy, renamed, capacities, devices=devices).resident == want).all()


@pytest.mark.parametrize("policy", ["redundance", "layers", "smartmoe", "eplb"])
def test_one_expert_on_one_server(policy):
    assert place(policy, np.zeros((1, 1, 1)), [5]).resident.all()


@pytest.mark.parametrize("module", [packing, importlib.import_module(rebalance_experts.__module__)])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
