"""uniform and dance: invariants, and stage by stage against a plain reading of the paper."""

import doctest
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.config import UserError
from dance_jax.placement import policies, visit
from dance_jax.placement.core import Placement
from dance_jax.placement.cost import CallCost
from dance_jax.placement.policies import POLICIES, place, rounding
from dance_jax.placement.policies.dance import assign, layer_counts
from tests.placement.cases import SHAPES, held_problems, problems

#: `latency` needs routes (test_latency).
OF_COUNTS = [name for name, policy in POLICIES.items() if not policy.needs_routes]
quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def plain_shares(capacity, entropy, experts):
    """One server's slots per layer by entropy (whole units), in exact fractions."""
    layers = len(entropy)
    full = set()
    while True:
        rest = [layer for layer in range(layers) if layer not in full]
        weight = {layer: int(entropy[layer]) for layer in rest}
        if not any(weight.values()):
            weight = dict.fromkeys(rest, 1)
        left, whole = capacity - experts * len(full), sum(weight.values())
        share = {layer: Fraction(left * weight[layer], whole) for layer in rest}
        over = {layer for layer in rest if share[layer] >= experts}
        if not over:
            break
        full |= over
    slots = [experts if layer in full else int(share[layer]) for layer in range(layers)]
    by_remainder = sorted(rest, key=lambda layer: (-(share[layer] - slots[layer]), layer))
    for layer in by_remainder[: capacity - sum(slots) if rest else 0]:
        slots[layer] += 1
    return slots


def plain_stage_1(counts, capacities, holders=1):
    servers, _, experts = counts.shape
    slots = []
    for n in range(servers):
        entropy = []
        for row in counts[n]:
            p = row / row.sum() if row.sum() > 0 else np.full(experts, 1 / experts)
            entropy.append(round(-sum(x * np.log(x) for x in p if x > 0) * 2**24))
        slots.append(plain_shares(int(capacities[n]), entropy, experts))
    slots = np.array(slots)
    by_memory = sorted(range(servers), key=lambda n: (-capacities[n], n))
    while (short := np.flatnonzero(slots.sum(0) < holders * experts)).size:
        surplus = np.flatnonzero(slots.sum(0) > holders * experts)
        server = next(
            n for n in by_memory if slots[n, surplus].any() and slots[n, short[0]] < experts
        )
        donor = max(
            (layer for layer in surplus if slots[server, layer]),
            key=lambda layer: (slots[:, layer].sum(), -layer),
        )
        slots[server, donor] -= 1
        slots[server, short[0]] += 1
    return slots


def plain_stage_2(counts, slots, holders=1):
    servers, layers, experts = counts.shape
    resident = np.zeros(counts.shape, bool)
    for layer in range(layers):
        held = [
            set(sorted(range(experts), key=lambda e: (-counts[n, layer, e], e))[: slots[n, layer]])
            for n in range(servers)
        ]
        while True:
            copies = [sum(e in each for each in held) for e in range(experts)]
            missing = {e for e in range(experts) if copies[e] < holders}
            if not missing:
                break
            twice = [{e for e in each if copies[e] > holders} for each in held]
            lacking = [n for n in range(servers) if missing - held[n]]
            n = max(lacking, key=lambda n: (len(twice[n]), -n))
            takes = min(missing - held[n], key=lambda e: (-counts[n, layer, e], e))
            held[n].remove(min(twice[n], key=lambda e: (counts[n, layer, e], e)))
            held[n].add(takes)
        for n in range(servers):
            resident[n, layer, list(held[n])] = True
    return resident


@pytest.mark.parametrize("policy", OF_COUNTS)
@quick
@given(problems())
def test_every_expert_somewhere_and_nobody_overfull(policy, problem):
    counts, capacities = problem
    placement = place(policy, counts, capacities)
    assert placement.resident.any(0).all()
    assert (placement.resident.sum((1, 2)) <= capacities).all()
    assert placement == place(policy, counts, capacities)


@quick
@given(held_problems(3))
def test_dance_stage_1_is_the_paper(problem):
    """With one holder; with more, every layer has slots for all copies."""
    counts, capacities, holders = problem
    capacities = np.minimum(capacities, counts[0].size)
    with jax.enable_x64(True):
        arrays = jnp.asarray(counts, jnp.float64), jnp.asarray(capacities, jnp.int64)
        got = np.asarray(layer_counts(*arrays, holders))
    assert (got == plain_stage_1(counts, capacities, holders)).all()
    assert (got.sum(0) >= holders * counts.shape[2]).all() and (got <= counts.shape[2]).all()


@quick
@given(held_problems(3))
def test_dance_is_the_paper(problem):
    counts, capacities, holders = problem
    capacities = np.minimum(capacities, counts[0].size)
    want = plain_stage_2(counts, plain_stage_1(counts, capacities, holders), holders)
    assert (place("dance", counts, capacities, holders=holders).resident == want).all()
    assert (want.sum(0) >= holders).all()
    # All memory is used.
    assert (want.sum((1, 2)) == capacities).all()


@quick
@given(problems(), st.integers(0, 2**32 - 1))
def test_dance_stage_2_with_any_counts_of_slots(problem, seed):
    counts = problem[0]
    servers, layers, experts = counts.shape
    slots = np.random.default_rng(seed).integers(0, experts + 1, (servers, layers))
    slots[0] = np.maximum(slots[0], experts - slots[1:].sum(0))
    with jax.enable_x64(True):
        got = assign(jnp.asarray(counts, jnp.float64), jnp.asarray(slots, jnp.int64), 1)
    assert (np.asarray(got) == plain_stage_2(counts, slots)).all()


@quick
@given(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1))
def test_dance_does_not_depend_on_the_names_of_experts(shape, seed):
    rng = np.random.default_rng(seed)
    counts = rng.gamma(0.5, size=shape)
    capacities = np.full(shape[0], -(-int(1.4 * shape[1] * shape[2]) // shape[0]))
    names = np.argsort(rng.random(shape[1:]), axis=1)
    renamed = np.take_along_axis(counts, names[None], axis=2)
    want = np.take_along_axis(place("dance", counts, capacities).resident, names[None], axis=2)
    assert (place("dance", renamed, capacities).resident == want).all()


@quick
@given(problems())
def test_uniform_is_one_block_a_layer_in_proportion(problem):
    counts, capacities = problem
    _, layers, experts = counts.shape
    resident = place("uniform", counts, capacities).resident
    assert (resident.sum(0) == 1).all()
    # Owners never decrease along a layer: one block each, in server order.
    assert (np.diff(resident.argmax(0), axis=1) >= 0).all()
    usable = np.minimum(capacities, layers * experts)
    ideal = layers * experts * usable / usable.sum()
    assert (abs(resident.sum((1, 2)) - ideal) < 1).all()
    sizes = resident.sum(2)
    assert (sizes.max(1) - sizes.min(1) <= 1).all()


def test_uniform_of_the_reference_set_up():
    resident = place("uniform", np.zeros((3, 24, 32)), [253, 253, 506]).resident
    owner = np.repeat([0, 1, 2], [8, 8, 16])
    assert (resident == (owner == np.arange(3)[:, None])[:, None, :]).all()


def test_dance_worked_examples():
    tied = place("dance", np.array([[[9, 5, 1, 0]], [[8, 6, 0, 1]]]), [2, 2])
    assert tied.resident.astype(int).tolist() == [[[0, 0, 1, 1]], [[1, 1, 0, 0]]]
    apart = place("dance", np.array([[[9, 5, 1, 0]], [[0, 1, 5, 9]]]), [2, 2])
    assert apart.resident.astype(int).tolist() == [[[1, 1, 0, 0]], [[0, 0, 1, 1]]]


def test_dance_gives_diverse_layers_more_slots():
    # Server 0 calls two experts in layer 0 and all in layer 1: entropies ln 2 and ln 8.
    counts = np.zeros((2, 2, 8))
    counts[0, 0, :2] = counts[0, 1] = counts[1] = 1
    held = place("dance", counts, [8, 16]).resident.sum(2)
    assert held.tolist() == [[2, 6], [8, 8]]


@pytest.mark.parametrize("policy", OF_COUNTS)
def test_capacity_above_everything_holds_each_expert_once_per_server(policy):
    counts = np.random.default_rng(0).integers(0, 9, (3, 4, 8))
    placement = place(policy, counts, [10**9, 0, 40])
    placement.validate([32, 0, 32])
    if policy == "dance":
        assert placement.resident[[0, 2]].all()


@pytest.mark.parametrize("policy", OF_COUNTS)
def test_capacity_of_exactly_one_copy(policy):
    counts = np.random.default_rng(0).integers(0, 9, (3, 4, 8))
    for capacities in ([11, 11, 10], [30, 1, 1], [32, 0, 0], [0, 0, 32]):
        resident = place(policy, counts, capacities).resident
        assert (resident.sum(0) == 1).all()
        assert resident.sum((1, 2)).tolist() == capacities


@pytest.mark.parametrize("policy", OF_COUNTS)
def test_missing_slots_are_named(policy):
    with pytest.raises(UserError, match=r"32 experts .* 27 slots, 5 slots are missing"):
        place(policy, np.ones((2, 4, 8)), [20, 7])


GOOD = np.ones((2, 4, 8))
ROUTES = [np.zeros((3, 4, 2), np.int16)] * 2


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (("best", GOOD, [32, 32]), {}, "unknown policy 'best'; there are uniform, "),
        (("dance", np.where(GOOD > 0, np.nan, 0), [32, 32]), {}, "finite"),
        (("dance", -GOOD, [32, 32]), {}, "at least 0"),
        (("dance", GOOD * np.inf, [32, 32]), {}, "finite"),
        (("dance", GOOD[0], [32, 32]), {}, r"\(4, 8\)"),
        (("dance", GOOD[:, :0], [32, 32]), {}, r"\(2, 0, 8\)"),
        (("dance", GOOD.astype(str), [32, 32]), {}, "numbers"),
        (("dance", GOOD, [32, 32, 32]), {}, "capacities: 2 whole numbers"),
        (("dance", GOOD, [20.0, 12.0]), {}, "capacities: 2 whole numbers"),
        (("dance", GOOD, [32, -1]), {}, "capacities: every number must be at least 0"),
        (("dance", GOOD, [32, 32]), {"devices": [1, 0]}, "devices: every .* at least 1"),
        (("dance", GOOD, [32, 32]), {"devices": [1]}, "devices: 2 whole numbers"),
        (("dance", GOOD, [32, 32]), {"routes": ROUTES[:1]}, "routes: 1 arrays for 2 servers"),
        (("dance", GOOD, [32, 32]), {"routes": [r + 8 for r in ROUTES]}, r"0\.\.7"),
        (("dance", GOOD, [32, 32]), {"routes": [r[:, :3] for r in ROUTES]}, "4 layers"),
        (
            ("dance", GOOD, [32, 32]),
            {"routes": [ROUTES[0], ROUTES[1][:, :, :1]]},
            "choose 2, 1 experts; one k",
        ),
        (("dance", GOOD, [32, 32]), {"routes": [r[:, :, :0] for r in ROUTES]}, "one k"),
        (("dance", GOOD, [32, 32]), {"cost": CallCost.reference([1], 2)}, "cost: of 1 servers"),
        (
            ("dance", GOOD, [32, 32]),
            {"cost": CallCost.reference([1, 2], 2), "devices": [1, 1]},
            r"cost: devices \[1 2\], but \[1 1\] are given",
        ),
        (
            ("dance", GOOD, [32, 32]),
            {"previous": Placement(np.ones((2, 4, 7), bool))},
            r"previous: placement \(2, 4, 7\)",
        ),
    ],
)
def test_malformed_inputs(arguments, keywords, message):
    with pytest.raises(UserError, match=message):
        place(*arguments, **keywords)


def test_valid_optional_inputs_are_accepted():
    counts = np.ones((3, 4, 8))
    routes = [np.zeros((tokens, 4, 2), np.int16) for tokens in (3, 0, 1)]
    previous = Placement(np.ones(counts.shape, bool))
    keywords = {"routes": routes, "devices": [1, 1, 2], "previous": previous, "seed": 3}
    want = place("dance", counts, [10, 10, 20])
    assert place("dance", counts, [10, 10, 20], **keywords) == want


@pytest.mark.parametrize("seed", [-1, 2**31, 2**70])
def test_any_whole_number_is_a_seed(seed):
    place("redundance", np.ones((2, 4, 8)), [20, 20], seed=seed).validate([20, 20])


def test_dance_keeps_more_calls_local_than_uniform():
    """Skewed workloads, equally weighed: most calls stay at home."""
    counts = np.exp(np.random.default_rng(0).normal(size=(3, 4, 8)))
    counts /= counts.sum((1, 2), keepdims=True)
    capacities = [10, 10, 22]
    shares = {policy: place(policy, counts, capacities).local_share(counts) for policy in OF_COUNTS}
    assert shares["dance"] > shares["uniform"] + 0.2


@pytest.mark.parametrize("module", [policies, rounding, visit])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
