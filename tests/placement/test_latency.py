"""latency: its moves, and what it finds, where servers call each other and in lock step."""

import dataclasses
import importlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.config import UserError
from dance_jax.placement.core import Placement
from dance_jax.placement.cost import CallCost, LockStepCost
from dance_jax.placement.flows import BLOCK_TOKENS
from dance_jax.placement.policies import POLICIES, place
from dance_jax.placement.policies.latency import SEARCH, SETTLE, Schedule, Search, latency
from dance_jax.placement.problem import Problem
from tests.placement.cases import (
    preferring_routes,
    random_order,
    random_resident,
    shorten_annealing,
)

quick = settings(max_examples=8, deadline=None, derandomize=True, database=None)
FORMS = (CallCost, LockStepCost)
#: Servers, layers, experts, k. Annealing is compiled once for each, and number of tokens, and cost.
TINY, LARGE, TOKENS = (2, 1, 4, 2), (3, 6, 16, 3), 500
CAPACITIES, DEVICES = [32, 32, 64], [1, 1, 2]
#: The name in the package is the policy's.
MODULE = importlib.import_module(Search.__module__)


def counts_of(routes, experts):
    layers = routes[0].shape[1]
    return np.stack(
        [
            [np.bincount(route[:, layer].ravel(), minlength=experts) for layer in range(layers)]
            for route in routes
        ]
    )


def random_cost(form, rng, servers):
    cost = form(
        state=rng.uniform(0.5, 2, servers),
        call=rng.uniform(0, 1, servers),
        devices=rng.integers(1, 3, servers),
        order=random_order(rng, servers),
        **({"round": rng.uniform(0, 2, servers)} if form is CallCost else {"transfer": 0.3}),
    )
    return cost


def problem_of(routes, experts, cost, capacities=None, seed=0, previous=None, holders=1):
    counts = counts_of(routes, experts)
    return Problem.checked(
        counts,
        [counts[0].size] * len(routes) if capacities is None else capacities,
        holders=holders,
        routes=routes,
        devices=None,
        cost=cost,
        previous=previous,
        seed=seed,
    )


@pytest.mark.parametrize("form", [CallCost, pytest.param(LockStepCost, marks=pytest.mark.slow)])
@quick
@given(
    seed=st.integers(0, 2**32 - 1),
    density=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    hot=st.sampled_from([1e-3, 1e3]),
    holders=st.integers(1, 3),
)
def test_annealing_keeps_slots_and_coverage(form, seed, density, hot, holders):
    rng = np.random.default_rng(seed)
    start = Placement(random_resident(rng, LARGE[:3], density, holders))
    routes, cost = preferring_routes(seed, LARGE, TOKENS), random_cost(form, rng, 3)
    search = Search(problem_of(routes, 16, cost, seed=seed, holders=holders))
    schedule = Schedule(50, hot, hot)
    end, seconds = search.anneal(start, schedule)
    end.validate(holders=holders)
    assert (end.resident.sum((1, 2)) == start.resident.sum((1, 2))).all()
    assert seconds == pytest.approx(search.seconds(end), rel=1e-5)
    assert search.anneal(start, schedule)[0] == end
    # Hot enough, anything goes that can: slots move between layers, too.
    if hot > 1 and density == 0.3 and holders < 3:
        assert (end.resident.sum(2) != start.resident.sum(2)).any()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_predicted_is_what_metrics_say(form):
    """By tokens that weigh as counts do, a server without any left out."""
    rng = np.random.default_rng(0)
    routes = preferring_routes(0, LARGE, BLOCK_TOKENS)
    routes[1] = routes[1][:0]
    placement, cost = Placement(random_resident(rng, LARGE[:3])), random_cost(form, rng, 3)
    problem = problem_of(routes, 16, cost)
    problem = dataclasses.replace(problem, counts=problem.counts * [[[3]], [[1]], [[1]]])
    want = placement.layer_time(routes, cost, [2.25, 0, 0.75])
    assert Search(problem).seconds(placement) == pytest.approx(want, rel=1e-5)


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


def test_holders_are_kept(drifting, short):
    """The policy and its starts look at them; what has fewer is not kept."""
    previous, workloads = drifting
    routes, cost = workloads["same"], CallCost.reference(DEVICES, 3)
    problem = problem_of(routes, 16, cost, [60, 60, 96], previous=previous, holders=2)
    found = POLICIES["latency"].place(problem)
    found.validate([60, 60, 96], holders=2)
    assert found.resident.sum() == 216
    # All its experts may stay.
    again = POLICIES["latency"].place(dataclasses.replace(problem, previous=found))
    again.validate([60, 60, 96], holders=2)
    assert again.moved(found) < found.moved(previous)


@pytest.mark.parametrize(
    ("seed", "capacities"), [(0, [2, 2]), (-1, [2, 2]), (1, [3, 2]), (2**70, [3, 2])]
)
@pytest.mark.parametrize("form", FORMS)
def test_small_cases_are_solved_to_the_optimum(form, seed, capacities, short):
    routes = preferring_routes(seed % 7, TINY, BLOCK_TOKENS)
    cost = random_cost(form, np.random.default_rng(seed % 7), 2)
    counts = counts_of(routes, 4)
    placement = place("latency", counts, capacities, routes=routes, cost=cost, seed=seed)
    want = brute_force(routes, capacities, cost, 4)
    assert placement.layer_time(routes, cost) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_less_time_than_every_other_policy(form, short):
    """On tokens that no policy has seen, and on those that they have."""
    routes = preferring_routes(1, LARGE, 3 * TOKENS)
    fit, unseen = [r[:TOKENS] for r in routes], [r[TOKENS:] for r in routes]
    counts, cost = counts_of(fit, 16), form.reference(DEVICES, 3)
    found = {
        policy: place(policy, counts, CAPACITIES, routes=fit, devices=DEVICES, cost=cost)
        for policy in POLICIES
    }
    best = found.pop("latency")
    best.validate(CAPACITIES)
    for tokens in (fit, unseen):
        others = min(each.layer_time(tokens, cost) for each in found.values())
        assert best.layer_time(tokens, cost) < 0.97 * others
    if form is CallCost:
        any_misses = [each.traffic(unseen).any_miss for each in (best, *found.values())]
        assert any_misses[0] < min(any_misses[1:])


@pytest.mark.parametrize("form", FORMS)
def test_never_worse_than_where_it_starts(form, monkeypatch):
    """Even where annealing only spoils: too hot, and stopped at once."""
    for name in ("SEARCH", "REFINE"):
        monkeypatch.setattr(MODULE, name, Schedule(20, 1e3, 1e3))
    routes = preferring_routes(3, LARGE, TOKENS)
    problem = problem_of(routes, 16, form.reference(DEVICES, 3), CAPACITIES)
    search = Search(problem)
    starts = [POLICIES[name].place(problem) for name in ("optimal", "layers")]
    found = latency(problem)
    assert search.seconds(found) == min(search.seconds(each) for each in starts)


@pytest.mark.slow
def test_forty_servers(monkeypatch):
    """More than a word has bits; the schedule is cut to what many servers allow."""
    monkeypatch.setattr(MODULE, "MOST_WORK", 3e8)
    shape = (40, 2, 16, 1)
    routes, capacities = preferring_routes(0, shape, BLOCK_TOKENS), [1, 2, 1, 1] * 10
    cost = CallCost.reference([1, 2] * 20, 1)
    counts = counts_of(routes, 16)
    arguments = {"routes": routes, "cost": cost, "devices": [1, 2] * 20}
    found = place("latency", counts, capacities, **arguments)
    found.validate(capacities)
    others = [place(name, counts, capacities, **arguments) for name in ("optimal", "layers")]
    best = min(each.layer_time(routes, cost) for each in others)
    assert found.layer_time(routes, cost) < best


def test_traffic_decides_whose_link_matters():
    # Both servers want experts 0 and 1, and one slot is left over: the busy one gets both.
    routes = [np.tile([[0, 1]], (BLOCK_TOKENS, 1, 1))] * 2
    for busy, form in itertools.product((0, 1), FORMS):
        counts = np.zeros((2, 1, 4))
        counts[:, 0, :2] = 1
        counts[busy, 0, :2] = 5
        cost = dataclasses.replace(form.reference([1, 1], 2), call=np.zeros(2))
        capacities = [3, 3]
        capacities[busy] = 2
        resident = place("latency", counts, capacities, routes=routes, cost=cost).resident
        assert resident[busy, 0].tolist() == [True, True, False, False] and resident.sum() == 5


@pytest.fixture(scope="module")
def drifting():
    """A placement in force, and routes of the same and of other workloads."""
    routes = preferring_routes(2, LARGE, 2 * TOKENS)
    old, new = [r[::2] for r in routes], [r[1::2] for r in routes]
    with pytest.MonkeyPatch.context() as patch:
        shorten_annealing(patch, 4)
        previous = place("latency", counts_of(old, 16), CAPACITIES, routes=old, devices=DEVICES)
    return previous, {"same": new, "other": new[1:] + new[:1]}


@pytest.mark.parametrize("workload", ["same", "other"])
def test_previous_lowers_churn_at_about_the_same_time(drifting, short, workload):
    previous, workloads = drifting
    routes, cost = workloads[workload], CallCost.reference(DEVICES, 3)
    arguments = ("latency", counts_of(routes, 16), CAPACITIES)
    free = place(*arguments, routes=routes, cost=cost)
    calm = place(*arguments, routes=routes, cost=cost, previous=previous)
    calm.validate(CAPACITIES)
    assert calm.moved(previous) < free.moved(previous)
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


@pytest.mark.slow
def test_previous_of_another_workload_does_not_hold_the_search_back(short):
    # Annealing from the old placement alone ends at 1.5 to 1.8 times the time.
    devices, capacities = [1, 1, 2], [58, 45, 77]
    cost = LockStepCost(
        state=np.ones(3), call=np.full(3, 0.003), devices=np.array(devices), transfer=1.0
    )
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


def test_previous_stays_where_nothing_is_better(drifting, short):
    # Fitted to these very tokens: annealing from there finds next to nothing.
    routes, cost = drifting[1]["other"], CallCost.reference(DEVICES, 3)
    problem = problem_of(routes, 16, cost, CAPACITIES)
    search = Search(problem)
    settled, _ = search.anneal(latency(problem), SETTLE)
    settled, _ = search.anneal(settled, SEARCH)
    assert latency(dataclasses.replace(problem, previous=settled)) == settled


def test_previous_that_is_not_full_or_does_not_fit(drifting, monkeypatch):
    shorten_annealing(monkeypatch, 40)
    routes = drifting[1]["same"]
    counts = counts_of(routes, 16)
    half_empty = place("uniform", counts, CAPACITIES)
    too_large = Placement(np.ones((3, 6, 16), bool))
    nowhere = Placement(np.zeros((3, 6, 16), bool))
    for previous in (half_empty, too_large, nowhere):
        found = place(
            "latency", counts, CAPACITIES, routes=routes, previous=previous, devices=DEVICES
        )
        found.validate(CAPACITIES)
        assert found.resident.sum() == sum(CAPACITIES)


def test_without_routes_optimal_takes_its_place(caplog):
    counts = counts_of(preferring_routes(0, LARGE, 20), 16)
    for routes in (None, [np.zeros((0, 6, 3), int)] * 3):
        caplog.clear()
        found = place("latency", counts, CAPACITIES, routes=routes)
        assert found == place("optimal", counts, CAPACITIES) and found.upper_bound is not None
        assert "latency needs routes" in caplog.text and "optimal" in caplog.text


def test_worked_example():
    """Its placement is the best; that small cases are solved is shown above."""
    routes = [np.array([[[0]], [[0]], [[1]]]), np.array([[[0]], [[0]], [[2]]])]
    cost = LockStepCost.reference([1, 1], 1)
    best = Placement(np.array([[[1, 1, 0, 1]], [[1, 0, 1, 0]]], bool))
    assert best.layer_time(routes, cost) == pytest.approx(0.5)
    assert brute_force(routes, [3, 2], cost, 4) == pytest.approx(0.5)
    other = Placement(np.array([[[1, 1, 1, 0]], [[0, 0, 1, 1]]], bool))
    assert other.layer_time(routes, cost) == pytest.approx(2 / 3 + 5 / 6 + 0.3 / 3)


@pytest.mark.parametrize("form", FORMS)
def test_unequal_servers_are_seen(form, short):
    """A slow link or a far server is spared, a slow device computes less."""
    routes = preferring_routes(3, LARGE, TOKENS)
    counts, capacities = counts_of(routes, 16), [40, 40, 40]

    def traffic(**changes):
        parts = {"state": [0.1] * 3, "call": [0.0] * 3, "devices": [1] * 3, **changes}
        if form is CallCost:
            parts = {"round": [0.1] * 3} | parts
        cost = form(**parts)
        return place("latency", counts, capacities, routes=routes, cost=cost).traffic(routes)

    def crossing(flows):
        return flows.transfers_lnn[:, 2].sum() + flows.transfers_lnn[:, :, 2].sum()

    before = crossing(traffic(call=[0.5] * 3))
    assert crossing(traffic(state=[1.0, 1.0, 4.0])) < 0.8 * before
    if form is CallCost:
        assert crossing(traffic(round=[0.1, 0.1, 1.0])) < 0.8 * before
    slow, equal = (
        traffic(call=call).calls_lnn[:, :, 2].sum() for call in ([0.5, 0.5, 2.0], [0.5] * 3)
    )
    assert slow < 0.8 * equal


def test_routes_are_needed_by_the_policy_itself():
    problem = Problem.checked(
        np.ones((1, 1, 2)), [2], routes=None, devices=None, cost=None, previous=None, seed=0
    )
    with pytest.raises(UserError, match="routes are needed"):
        POLICIES["latency"].place(problem)
