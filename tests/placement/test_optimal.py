"""optimal: against HiGHS and brute force, with its bound; ties and churn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.placement.core import Placement
from dance_jax.placement.policies import place
from dance_jax.placement.policies.transport import balance, choose
from tests.placement.cases import SHAPES, held_problems, problems

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def highs(counts, capacities, holders=1):
    """Most calls at home, by HiGHS' linear program over x[n, j] in [0, 1]."""
    servers = len(counts)
    value_nj = counts.reshape(servers, -1)
    items = value_nj.shape[1]
    held = scipy.sparse.kron(scipy.sparse.eye_array(servers), np.ones((1, items)))
    copies = scipy.sparse.kron(np.ones((1, servers)), scipy.sparse.eye_array(items))
    # HiGHS has absolute tolerances.
    unit = max(value_nj.max(), 1e-300)
    result = scipy.optimize.linprog(
        -value_nj.reshape(-1) / unit,
        A_ub=scipy.sparse.vstack([held, -copies]).tocsr(),
        b_ub=np.concatenate([capacities, np.full(items, -holders)]),
        bounds=(0, 1),
        method="highs",
    )
    assert result.status == 0
    return -result.fun * unit


def at_home(placement, counts):
    return (placement.resident * counts).sum()


def check_against_highs(counts, capacities, holders=1):
    placement = place("optimal", counts, capacities, holders=holders)
    placement.validate(capacities, holders=holders)
    want = highs(np.asarray(counts, float), capacities, holders)
    assert at_home(placement, counts) == pytest.approx(want, rel=1e-6, abs=1e-9)
    share = placement.local_share(counts)
    assert placement.upper_bound is not None
    assert share <= placement.upper_bound <= share + 1e-6


@pytest.mark.slow
@quick
@given(held_problems(3))
def test_optimum_and_bound_are_those_of_highs(problem):
    check_against_highs(*problem)


@pytest.mark.parametrize("memory", [1.0, 1.05, 1.32, 2.5])
@pytest.mark.parametrize("kind", ["gamma", "ties"])
def test_many_servers_and_experts(memory, kind):
    rng = np.random.default_rng(0)
    shape, weights = (8, 6, 32), np.array([1, 5, 1, 2, 1, 1, 9, 3])
    rate = 2 * rng.gamma(0.3, size=shape)
    counts = rate if kind == "gamma" else rng.poisson(rate)
    total = shape[1] * shape[2]
    capacities = np.minimum((memory * total * weights / weights.sum()).astype(int), total)
    capacities[0] += max(0, total - capacities.sum())
    check_against_highs(counts, capacities)


@pytest.mark.parametrize(("memory", "holders"), [(2.0, 2), (2.3, 2), (3.5, 3)])
@pytest.mark.parametrize("kind", ["gamma", "ties"])
def test_many_servers_with_more_holders(memory, holders, kind):
    rng = np.random.default_rng(0)
    shape = (5, 6, 32)
    rate = 2 * rng.gamma(0.3, size=shape)
    counts, total = rate if kind == "gamma" else rng.poisson(rate), shape[1] * shape[2]
    capacities = [total, *np.array([0.2, 0.3, 0.3, 0.2]) @ np.eye(4) * (memory - 1) * total]
    check_against_highs(counts, np.ceil(np.minimum(capacities, total)).astype(int), holders)


@pytest.mark.parametrize("capacities", [[2, 2], [3, 1], [3, 2], [4, 0], [4, 4]])
@quick
@given(counts=st.lists(st.integers(0, 5), min_size=8, max_size=8))
def test_brute_force(capacities, counts):
    counts = np.array(counts).reshape(2, 1, 4)
    best = 0
    for held in itertools.product(
        *(itertools.combinations(range(4), min(slots, 4)) for slots in capacities)
    ):
        if set(held[0]) | set(held[1]) == set(range(4)):
            best = max(best, sum(counts[n, 0, list(held[n])].sum() for n in range(2)))
    placement = place("optimal", counts, capacities)
    assert at_home(placement, counts) == best
    if counts.any():
        assert placement.upper_bound == pytest.approx(best / counts.sum(), abs=1e-9)


@settings(quick, max_examples=20)  # each example places three times
@given(problems(), st.integers(0, 2**32 - 1))
def test_names_of_experts_and_servers_change_nothing(problem, seed):
    counts, capacities = problem
    rng = np.random.default_rng(seed)
    want = at_home(place("optimal", counts, capacities), counts)
    order = rng.permutation(len(counts))
    moved = counts[order]
    assert at_home(place("optimal", moved, capacities[order]), moved) == pytest.approx(want)
    names = np.argsort(rng.random(counts.shape[1:]), axis=1)
    renamed = np.take_along_axis(counts, names[None], axis=2)
    assert at_home(place("optimal", renamed, capacities), renamed) == pytest.approx(want)


@quick
@given(problems())
def test_never_worse_than_the_paper_and_all_memory_used(problem):
    counts, capacities = problem
    placement = place("optimal", counts, capacities)
    total = counts[0].size
    assert (placement.resident.sum((1, 2)) == np.minimum(capacities, total)).all()
    rounding = 1e-9 * float(np.asarray(counts, float).sum())
    dance = at_home(place("dance", counts, capacities), counts)
    assert at_home(placement, counts) >= dance - rounding


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 7])
def test_equal_counts_give_the_placement_of_dance(shape, count):
    counts = np.full(shape, count)
    capacities = np.full(shape[0], min(-(-4 * counts[0].size // (3 * shape[0])), counts[0].size))
    placement = place("optimal", counts, capacities)
    assert placement == place("dance", counts, capacities)
    share = capacities.sum() / counts.size
    assert placement.upper_bound == pytest.approx(share)


@quick
@given(problems(), st.integers(0, 2**32 - 1))
def test_previous_saves_moves_within_one_percent(problem, seed):
    counts, capacities = problem
    rng = np.random.default_rng(seed)
    free = place("optimal", counts, capacities)
    assert place("optimal", counts, capacities, previous=free) == free
    other = np.maximum(counts * rng.choice([0.5, 1, 2], counts.shape), 0)
    previous = place("optimal", other, capacities)
    calm = place("optimal", counts, capacities, previous=previous)
    calm.validate(capacities)
    assert calm.moved(previous) <= free.moved(previous)
    total = float(np.asarray(counts, float).sum())
    fewest = total - at_home(free, counts)
    assert total - at_home(calm, counts) <= 1.01 * fewest + 1e-9 * total
    assert calm.upper_bound == pytest.approx(free.upper_bound)


def test_previous_saves_many_moves_where_little_has_changed():
    rng = np.random.default_rng(0)
    counts = rng.gamma(1.0, size=(8, 6, 32))
    capacities = [20, 30, 40, 20, 30, 40, 20, 60]
    previous = place("optimal", counts, capacities)
    later = counts * rng.uniform(0.9, 1.1, counts.shape)
    free = place("optimal", later, capacities)
    calm = place("optimal", later, capacities, previous=previous)
    assert free.moved(previous) > 0 and calm.moved(previous) < 0.5 * free.moved(previous)


def test_previous_that_does_not_fit_is_only_a_wish():
    counts = np.random.default_rng(0).gamma(1.0, size=(3, 4, 8))
    for resident in (np.ones(counts.shape, bool), np.zeros(counts.shape, bool)):
        place("optimal", counts, [11, 11, 22], previous=Placement(resident)).validate([11, 11, 22])


def test_more_servers_than_bits_and_servers_without_memory():
    counts = np.random.default_rng(0).gamma(0.3, size=(33, 1, 16))
    check_against_highs(counts, np.arange(33) % 3)


def test_balance_mends_any_prices():
    """The search for prices makes it short; the optimum it does not need."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1000, (3, 32))
    capacities = np.array([20, 12, 5])
    want = highs(values.reshape(3, 4, 8).astype(float), capacities)

    @jax.jit
    def balanced(value_nj, capacity_n, price_n):
        return balance(value_nj, capacity_n, choose(value_nj, price_n, 1), 1)[0]

    for prices in ([0, 0, 0], [900, 0, 300], [0, 1000, 0]):
        with jax.enable_x64(True):
            held = balanced(
                *(jnp.asarray(each, jnp.int64) for each in (values, capacities, prices))
            )
        assert (held.sum(1) == capacities).all() and held.any(0).all()
        assert (values * np.asarray(held)).sum() == pytest.approx(want)


def test_worked_example():
    counts = np.array([[[9, 5, 1, 0]], [[8, 6, 0, 1]]])
    placement = place("optimal", counts, [2, 2])
    assert placement.resident.astype(int).tolist() == [[[1, 0, 1, 0]], [[0, 1, 0, 1]]]
    assert placement.upper_bound == pytest.approx(17 / 30)
