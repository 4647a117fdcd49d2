"""latency: its time of many blocks against the metrics, its moves, and what it finds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dance_jax.placement.policies.lockstep import Sample, layer_times, locate, relocate
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.config import UserError
from dance_jax.placement import Cost, Placement, place, visit, why_not
from dance_jax.placement.policies import lockstep
from dance_jax.placement.policies.latency import SEARCH, SETTLE, Schedule, anneal

quick = settings(max_examples=8, deadline=None, derandomize=True, database=None)
#: Servers, layers, experts, k.
SHAPE = (3, 4, 8, 2)
#: The same for what takes long to compile, and tokens of each server there: compiled once.
LARGE, TOKENS = (3, 6, 16, 3), 500


def preferring_routes(seed, shape=SHAPE, tokens=200):
    """Workloads with their own preferences: per server int [tokens, layers, k]."""
    servers, layers, experts, k = shape
    rng = np.random.default_rng(seed)
    return [
        np.argsort(
            -(rng.gumbel(size=(layers, experts)) + rng.gumbel(size=(tokens, layers, experts)))
        )[:, :, :k]
        for _ in range(servers)
    ]


def counts_of(routes, experts):
    layers = routes[0].shape[1]
    return np.stack(
        [
            [np.bincount(route[:, layer].ravel(), minlength=experts) for layer in range(layers)]
            for route in routes
        ]
    )


def random_placement(rng, shape=SHAPE, density=0.3):
    resident = rng.random(shape[:3]) < density
    home = rng.integers(0, shape[0], shape[1:3])
    return Placement(resident | (np.arange(shape[0])[:, None, None] == home))


def random_cost(rng, servers):
    return Cost(
        rng.uniform(0.5, 2, servers), rng.uniform(0, 1, servers), rng.integers(1, 3, servers), 0.3
    )


def masks(placement):
    return jnp.asarray(visit.masks(placement.resident)[0])


@pytest.mark.parametrize("servers", [1, 3, 8, 9])
@quick
@given(seed=st.integers(0, 2**32 - 1))
def test_times_of_blocks_are_the_metrics_of_each_block(servers, seed):
    rng = np.random.default_rng(seed)
    shape = (servers, 2, 6, 3)
    routes = preferring_routes(seed, shape, tokens=2 * lockstep.BLOCK_TOKENS)
    placement, cost = random_placement(rng, shape), random_cost(rng, servers)
    weights = rng.uniform(0, 2, servers)
    sample = Sample.of(routes, cost, weights, 6)
    got = jax.jit(layer_times)(sample, locate(sample, masks(placement)))
    # Two blocks: neighbours are dealt to different ones.
    want = [
        placement.layer_time([route[b::2] for route in routes], cost, weights) for b in range(2)
    ]
    assert got.shape == (2,) and float(got.mean()) == pytest.approx(np.mean(want), rel=1e-5)


def test_a_server_without_routes_or_with_few_of_them():
    rng = np.random.default_rng(0)
    routes = preferring_routes(0, tokens=lockstep.BLOCK_TOKENS)
    routes = [routes[0], routes[1][:0], routes[2][:16]]
    placement, cost = random_placement(rng), random_cost(rng, 3)
    sample = Sample.of(routes, cost, np.ones(3), 8)
    got = layer_times(sample, locate(sample, masks(placement)))
    assert float(got.mean()) == pytest.approx(placement.layer_time(routes, cost), rel=1e-5)


def test_a_long_sample_is_thinned_out_evenly():
    size = lockstep.BLOCK_TOKENS * lockstep.MAX_BLOCKS
    routes = [np.arange(2 * size)[:, None, None] % 2 for _ in range(2)]
    sample = Sample.of(routes, Cost.reference([1, 1], 1), np.ones(2), 2)
    assert sample.experts.size == 2 * size and not np.asarray(sample.experts).any()


@quick
@given(seed=st.integers(0, 2**32 - 1))
def test_relocate_is_locate_of_the_changed_placement(seed):
    rng = np.random.default_rng(seed)
    sample = Sample.of(preferring_routes(seed), Cost.reference([1] * 3, 2), np.ones(3), 8)
    before = masks(random_placement(rng))
    expert = rng.integers(0, 9, 4)
    mask = rng.integers(1, 8, 4)
    after = np.asarray(before).copy()
    chosen = expert < 8
    after[np.flatnonzero(chosen), expert[chosen]] = mask[chosen]
    got = relocate(
        sample, locate(sample, before), jnp.asarray(expert, jnp.int32), jnp.asarray(mask, "uint8")
    )
    assert (got == locate(sample, jnp.asarray(after))).all()


@quick
@given(
    seed=st.integers(0, 2**32 - 1),
    density=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    hot=st.sampled_from([1e-3, 1e3]),
)
def test_annealing_keeps_slots_and_coverage(seed, density, hot):
    rng = np.random.default_rng(seed)
    start = random_placement(rng, density=density)
    cost = random_cost(rng, 3)
    sample = Sample.of(preferring_routes(seed), cost, np.ones(3), 8)
    schedule = Schedule(50, hot, hot)
    end, seconds = anneal(sample, start, schedule, seed % 2**31)
    end.validate()
    assert (end.resident.sum((1, 2)) == start.resident.sum((1, 2))).all()
    times = layer_times(sample, locate(sample, masks(end)))
    assert seconds == pytest.approx(float(times.mean()), rel=1e-5)
    assert anneal(sample, start, schedule, seed % 2**31)[0] == end
    # Hot enough, anything goes that can: slots move between layers, too.
    if hot > 1 and density == 0.3:
        assert (end.resident.sum(2) != start.resident.sum(2)).any()


def brute_force(routes, capacities, cost, experts):
    """The least layer time of one layer over all placements that use all memory."""
    servers = len(routes)
    choices = [list(itertools.combinations(range(experts), slots)) for slots in capacities]
    best = np.inf
    for held in itertools.product(*choices):
        resident = np.zeros((servers, 1, experts), bool)
        for n, which in enumerate(held):
            resident[n, 0, list(which)] = True
        if resident.any(0).all():
            best = min(best, Placement(resident).layer_time(routes, cost))
    return best


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("capacities", [[2, 2], [3, 2]])
def test_small_cases_are_solved_to_the_optimum(seed, capacities):
    shape = (2, 1, 4, 2)
    routes = preferring_routes(seed, shape, tokens=lockstep.BLOCK_TOKENS)
    cost = random_cost(np.random.default_rng(seed), 2)
    counts = counts_of(routes, 4)
    placement = place("latency", counts, capacities, routes=routes, cost=cost)
    want = brute_force(routes, capacities, cost, 4)
    assert placement.layer_time(routes, cost) == pytest.approx(want, rel=1e-5)


def test_less_time_than_every_other_policy_on_unseen_tokens():
    routes = preferring_routes(1, LARGE, tokens=1500)
    fit, unseen = [r[:TOKENS] for r in routes], [r[TOKENS:] for r in routes]
    counts, capacities, devices = counts_of(fit, 16), [32, 32, 64], [1, 1, 2]
    cost = Cost.reference(devices, 3)
    times = {}
    for policy in ("uniform", "redundance", "layers", "smartmoe", "eplb", "dance", "optimal"):
        placement = place(policy, counts, capacities, devices=devices)
        times[policy] = placement.layer_time(unseen, cost)
    found = place("latency", counts, capacities, routes=fit, devices=devices)
    found.validate(capacities)
    assert found.layer_time(unseen, cost) < 0.95 * min(times.values())


def test_traffic_decides_whose_link_matters():
    # Both servers want expert 0, and one slot is left over: the busy one gets the copy.
    routes = [np.zeros((64, 1, 1), int), np.zeros((64, 1, 1), int)]
    for busy in (0, 1):
        counts = np.zeros((2, 1, 3))
        counts[:, 0, 0] = 1
        counts[busy, 0, 0] = 5
        cost = Cost([1, 1], [0, 0], [1, 1])
        resident = place("latency", counts, [1, 2], routes=routes, cost=cost).resident
        assert resident[busy, 0, 0] and resident.sum() == 3


@pytest.fixture(scope="module")
def drifting():
    """A placement in force, and routes of the same and of other workloads."""
    routes = preferring_routes(2, LARGE, tokens=2 * TOKENS)
    old, new = [r[::2] for r in routes], [r[1::2] for r in routes]
    keywords = {"devices": [1, 1, 2]}
    capacities = [32, 32, 64]
    previous = place("latency", counts_of(old, 16), capacities, routes=old, **keywords)
    return previous, {"same": new, "other": new[1:] + new[:1]}, capacities, keywords


@pytest.mark.parametrize("workload", ["same", "other"])
def test_previous_lowers_churn_at_about_the_same_time(drifting, workload):
    previous, workloads, capacities, keywords = drifting
    routes = workloads[workload]
    arguments = ("latency", counts_of(routes, 16), capacities)
    free = place(*arguments, routes=routes, **keywords)
    calm = place(*arguments, routes=routes, previous=previous, **keywords)
    calm.validate(capacities)
    assert calm.moved(previous) < free.moved(previous)
    cost = Cost.reference(keywords["devices"], 3)
    assert calm.layer_time(routes, cost) < 1.03 * free.layer_time(routes, cost)


def zipf_routes(seed, tokens, layers=2, experts=64, k=6, exponent=2.0):
    """Workloads of which each loves a few experts of its own, [tokens, layers, k] per server."""
    rng = np.random.default_rng(seed)
    fame = -exponent * np.log(np.arange(1, experts + 1))
    routes = []
    for count in tokens:
        fame_le = np.stack([rng.permutation(fame) for _ in range(layers)])
        noise_tle = rng.gumbel(size=(count, layers, experts))
        routes.append(np.argsort(-(fame_le + noise_tle))[:, :, :k])
    return routes


def test_previous_of_another_workload_does_not_hold_the_search_back():
    # Annealing from the old placement alone ends at 1.5 to 1.8 times the time.
    devices, capacities = [1, 1, 2], [58, 45, 77]
    cost = Cost(np.ones(3), np.full(3, 0.003), np.array(devices), 1.0)
    old, new = zipf_routes(10, (60, 60, 480)), zipf_routes(20, (60, 480, 60))
    previous = place(
        "latency", counts_of(old, 64), capacities, routes=old, devices=devices, cost=cost
    )
    counts = counts_of(new, 64)
    arguments = {"routes": new, "devices": devices, "cost": cost}
    free = place("latency", counts, capacities, **arguments)
    calm = place("latency", counts, capacities, previous=previous, **arguments)
    weights = counts.sum((1, 2)) / counts.sum((1, 2)).mean()
    times = [each.layer_time(new, cost, weights) for each in (calm, free)]
    assert times[0] < 1.03 * times[1]
    assert calm.moved(previous) < free.moved(previous)


def test_previous_stays_where_nothing_is_better(drifting):
    _, workloads, capacities, keywords = drifting
    # Fitted to these very tokens: annealing from there finds next to nothing.
    routes = workloads["other"]
    fitted = place("latency", counts_of(routes, 16), capacities, routes=routes, **keywords)
    sample = Sample.of(routes, Cost.reference([1, 1, 2], 3), np.ones(3), 16)
    settled, _ = anneal(sample, fitted, SETTLE, 0)
    settled, _ = anneal(sample, settled, SEARCH, 0)
    again = place(
        "latency", counts_of(routes, 16), capacities, routes=routes, previous=settled, **keywords
    )
    assert again == settled


def test_previous_that_is_not_full_or_does_not_fit(drifting):
    _, workloads, capacities, keywords = drifting
    routes = workloads["same"]
    arguments = ("latency", counts_of(routes, 16), capacities)
    half_empty = place("uniform", *arguments[1:])
    too_large = Placement(np.ones((3, 6, 16), bool))
    nowhere = Placement(np.zeros((3, 6, 16), bool))
    for previous in (half_empty, too_large, nowhere):
        found = place(*arguments, routes=routes, previous=previous, **keywords)
        found.validate(capacities)
        assert found.resident.sum() == sum(capacities)


def test_without_routes_optimal_takes_its_place(caplog):
    counts = counts_of(preferring_routes(0), 8)
    for routes in (None, [np.zeros((0, 4, 2), int)] * 3):
        caplog.clear()
        found = place("latency", counts, [11, 11, 22], routes=routes)
        assert found == place("optimal", counts, [11, 11, 22]) and found.upper_bound is not None
        assert "latency needs routes" in caplog.text and "optimal" in caplog.text


def test_for_too_many_servers_optimal_takes_its_place(caplog):
    shape = (visit.WORD + 1, 2, 6, 2)
    routes = preferring_routes(0, shape, tokens=4)
    counts = counts_of(routes, 6)
    found = place("latency", counts, [1] * shape[0], routes=routes)
    assert found == place("optimal", counts, [1] * shape[0])
    assert "latency takes too long for more than 32 servers: optimal places" in caplog.text
    assert not why_not("latency", routes[1:])


def test_worked_example():
    routes = [np.array([[[0]], [[0]], [[1]]]), np.array([[[0]], [[0]], [[2]]])]
    counts = counts_of(routes, 4)
    placement = place("latency", counts, [3, 2], routes=routes)
    assert placement.resident.astype(int).tolist() == [[[1, 1, 0, 1]], [[1, 0, 1, 0]]]
    assert placement.layer_time(routes) == pytest.approx(0.5)
    other = Placement(np.array([[[1, 1, 1, 0]], [[0, 0, 1, 1]]], bool))
    assert other.layer_time(routes) == pytest.approx(2 / 3 + 5 / 6 + 0.3 / 3)


def test_unequal_links_and_devices_are_seen():
    """A slow link is spared, a slow device computes less."""
    routes = preferring_routes(3, LARGE, tokens=TOKENS)
    counts, capacities = counts_of(routes, 16), [40, 40, 40]
    equal = Cost([1.0] * 3, [0.5] * 3, [1] * 3)
    slow_link = Cost([1.0, 1.0, 4.0], [0.0] * 3, [1] * 3)
    slow_device = Cost([0.1] * 3, [0.5, 0.5, 2.0], [1] * 3)

    def traffic(cost):
        return place("latency", counts, capacities, routes=routes, cost=cost).traffic(routes)

    flows = traffic(slow_link).transfers_lnn.sum(0)
    before = traffic(equal).transfers_lnn.sum(0)
    assert flows[2].sum() + flows[:, 2].sum() < 0.8 * (before[2].sum() + before[:, 2].sum())
    calls, before = (traffic(cost).calls_lnn.sum((0, 1)) for cost in (slow_device, equal))
    assert calls[2] < 0.8 * before[2]


def test_routes_are_needed_by_the_policy_itself():
    from dance_jax.placement.policies import POLICIES
    from dance_jax.placement.problem import Problem

    problem = Problem.checked(
        np.ones((1, 1, 2)), [2], routes=None, devices=None, cost=None, previous=None, seed=0
    )
    with pytest.raises(UserError, match="routes are needed"):
        POLICIES["latency"](problem)
