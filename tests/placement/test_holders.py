"""More than one holder for every expert: all policies, the repair of baselines, migrations."""

import dataclasses

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.config import UserError
from dance_jax.placement.core import Layout, Placement
from dance_jax.placement.devices import spread
from dance_jax.placement.migration import batches
from dance_jax.placement.policies import POLICIES, place
from dance_jax.placement.policies.repair import repaired
from dance_jax.placement.problem import Problem
from tests.placement.cases import held_problems, random_resident

quick = settings(max_examples=15, deadline=None, derandomize=True, database=None)
OF_COUNTS = [name for name, policy in POLICIES.items() if not policy.needs_routes]
#: Policies that look at holders themselves.
REAL = ("dance", "optimal")


def checked(counts, capacities, holders) -> Problem:
    more = {"routes": None, "devices": None, "cost": None, "previous": None, "seed": 0}
    return Problem.checked(counts, capacities, holders=holders, **more)


@pytest.mark.parametrize("policy", OF_COUNTS)
@quick
@given(held_problems(2, least=2))
def test_every_expert_has_its_holders(policy, problem):
    counts, capacities, holders = problem
    placement = place(policy, counts, capacities, holders=holders)
    placement.validate(capacities, holders=holders)
    assert placement == place(policy, counts, capacities, holders=holders)
    if policy in REAL:
        own = POLICIES[policy].place(checked(counts, capacities, holders))
        own.validate(capacities, holders=holders)


def most_kept(before: np.ndarray, problem: Problem) -> int:
    """Most copies that can stay, by HiGHS."""
    servers = len(before)
    items = before[0].size
    held = scipy.sparse.kron(scipy.sparse.eye_array(servers), np.ones((1, items)))
    copies = scipy.sparse.kron(np.ones((1, servers)), scipy.sparse.eye_array(items))
    limits = scipy.sparse.vstack([held, -copies]).tocsr()
    bounds = np.concatenate([problem.capacities, np.full(items, -problem.holders)])
    stays = before.reshape(-1).astype(float)
    result = scipy.optimize.linprog(-stays, limits, bounds, bounds=(0, 1), method="highs")
    assert result.status == 0
    return round(-result.fun)


@quick
@given(held_problems(2, least=2), st.floats(0.0, 1.0))
def test_the_repair_evicts_as_little_as_possible(problem, density):
    counts, capacities, holders = problem
    checked_problem = checked(counts, capacities, holders)
    rng = np.random.default_rng(int(density * 1e6))
    before = np.zeros(counts.shape, bool)
    for n, slots in enumerate(checked_problem.capacities):
        which = rng.permutation(before[0].size)[: round(slots * density)]
        before[n].reshape(-1)[which] = True
    found = repaired(Placement(before), checked_problem).resident
    Placement(found).validate(capacities, holders=holders)
    assert (found & before).sum() == most_kept(before, checked_problem)
    added = (found & ~before).any(0)
    assert (found.sum(0) == holders)[added].all(), "no more is added than needed"
    enough = Placement(found)
    assert repaired(enough, checked_problem) is enough


def test_the_repair_adds_where_experts_are_called():
    counts = np.array([[[0, 5, 2, 1]], [[0, 1, 7, 1]], [[9, 0, 1, 3]]])
    before = Placement(np.array([[[1, 1, 0, 0]], [[0, 0, 1, 1]], [[1, 0, 0, 0]]], bool))
    found = repaired(before, checked(counts, [3, 3, 3], 2)).resident
    # One slot on the first and on the second server, two on the third, for experts 1, 2 and 3.
    assert found[:, 0].astype(int).tolist() == [[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 1]]


@pytest.mark.parametrize(
    ("capacities", "holders", "message"),
    [
        ([30, 30, 3], 2, r"32 experts that 2 servers each must hold .* 63 slots, 1 slots are"),
        # A server has no use for more slots than experts.
        ([90, 20, 5], 2, r"have 57 slots, 7 slots are missing"),
        ([32, 32, 32], 4, "holders: from 1 to 3"),
        ([32, 32, 32], 0, "holders: from 1 to 3"),
    ],
)
def test_what_does_not_fit_is_refused(capacities, holders, message):
    with pytest.raises(UserError, match=message):
        place("dance", np.ones((3, 4, 8)), capacities, holders=holders)
    with pytest.raises(UserError, match="1 experts are on fewer than 2 servers, the first is"):
        Placement(np.array([[[1, 1]], [[1, 0]]], bool)).validate(holders=2)


def random_layout(rng, holders, spare, devices, previous: Layout | None = None) -> Layout:
    shape = (len(devices), 2, 8)
    resident = random_resident(rng, shape, float(rng.choice([0.0, 0.2])), holders)
    slots = [-(-resident[0].size // each) + spare for each in devices]
    return spread(Placement(resident), devices, slots, rng.random(shape), previous, spare, holders)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    holders=st.integers(1, 3),
    devices=st.sampled_from([(1, 1, 1), (1, 1, 2, 1), (2, 2, 2)]),
    empty=st.integers(1, 2),
    most=st.integers(1, 3),
    keep=st.booleans(),
)
def test_a_migration_never_takes_an_expert_below_its_holders(
    seed, holders, devices, empty, most, keep
):
    """However few slots are empty, and where experts change devices of one server."""
    rng = np.random.default_rng(seed)
    roomy = random_layout(rng, holders, 0, devices)
    target = random_layout(rng, holders, 0, devices, roomy if keep else None)
    # As few slots as both need, and `empty` besides.
    used = [
        max(
            int((each.device_of[n] == device).sum())
            for each in (roomy, target)
            for device in range(devices[n])
        )
        for n in range(len(devices))
    ]
    slots = tuple(count + empty for count in used)
    old, new = (
        _packed(dataclasses.replace(each, slots_per_device=slots)) for each in (roomy, target)
    )
    layout = old
    for _, after in batches(old, new, most):
        layout = after
        assert (layout.resident.sum(0) >= holders).all()
    assert (layout.device_of == new.device_of).all()


def _packed(layout: Layout) -> Layout:
    """The layout with every device's experts in its first slots."""
    slot_of = np.full_like(layout.slot_of, -1)
    for server, devices in enumerate(layout.devices):
        for device in range(devices):
            here = layout.device_of[server] == device
            slot_of[server][here] = np.arange(here.sum())
    return dataclasses.replace(layout, slot_of=slot_of)


def test_a_layout_keeps_its_number_of_holders():
    layout = random_layout(np.random.default_rng(0), 2, 1, (1, 1, 1))
    assert Layout.from_bytes(layout.to_bytes()).holders == layout.holders == 2
