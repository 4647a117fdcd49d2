"""The experts of a server over its devices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.config import UserError
from dance_jax.placement.core import Placement
from dance_jax.placement.devices import spread
from dance_jax.placement.policies import place

SHAPE, DEVICES = (3, 4, 8), (1, 2, 3)


def check_layout(layout, placement, devices, slots):
    """Every resident expert lies in exactly one slot of its server, and nothing else does."""
    for n in range(placement.num_servers):
        resident = placement.resident[n]
        assert ((layout.device_of[n] >= 0) == resident).all()
        assert ((layout.slot_of[n] >= 0) == resident).all()
        assert layout.device_of[n].max() < devices[n] and layout.slot_of[n].max() < slots[n]
        seen = []
        for device in range(devices[n]):
            table = layout.experts_of(n, device)
            assert table.shape == (slots[n], 2) and table.dtype == np.int32
            filled = (table >= 0).all(1)
            assert ((table == -1).all(1) == ~filled).all()
            # Slots fill up from 0, in order of layers.
            assert filled[: filled.sum()].all() and (np.diff(table[filled, 0]) >= 0).all()
            seen += [tuple(pair) for pair in table[filled]]
        assert len(seen) == len(set(seen)) == resident.sum()
        assert sorted(seen) == [tuple(pair) for pair in np.argwhere(resident)]
    assert (layout.resident == placement.resident).all()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.integers(0, 3),
    st.sampled_from(["skewed", "flat", "zero"]),
)
def test_layout_is_valid_and_even_where_tight(seed, density, spare, kind):
    rng = np.random.default_rng(seed)
    resident = rng.random(SHAPE) < density
    resident[2] |= ~resident.any(0)
    placement = Placement(resident)
    slots = [
        -(-int(held) // devices) + spare
        for held, devices in zip(resident.sum((1, 2)), DEVICES, strict=True)
    ]
    counts = {"skewed": rng.gamma(0.2, size=SHAPE), "flat": np.ones(SHAPE), "zero": None}[kind]
    layout = spread(placement, DEVICES, slots, counts)
    check_layout(layout, placement, DEVICES, slots)
    if kind == "zero":
        again = spread(placement, DEVICES, slots, np.zeros(SHAPE))
        assert (again.device_of == layout.device_of).all()


def test_no_device_waits_for_one_with_far_more_calls():
    rng = np.random.default_rng(0)
    placement = Placement(np.ones((1, 6, 32), bool))
    counts = rng.gamma(1.0, size=(1, 6, 32))
    device_of = spread(placement, [2], [96], counts).device_of[0]
    for layer in range(6):
        load = [counts[0, layer][device_of[layer] == device].sum() for device in range(2)]
        assert max(load) <= 1.03 * np.mean(load)


def test_spare_slots_let_a_heavy_expert_stay_alone():
    counts = np.array([[[30, 10, 10, 10]]])
    placement = Placement(np.ones((1, 1, 4), bool))
    assert spread(placement, [2], [3], counts).device_of.tolist() == [[[0, 1, 1, 1]]]
    assert spread(placement, [2], [2], counts).device_of.tolist() == [[[0, 1, 1, 0]]]


def test_calls_of_servers_that_lack_the_expert_count():
    # Server 1 never calls expert 0 itself, but runs all of server 0's calls of it.
    placement = Placement(np.array([[[False, True, False, False]], [[True, False, True, True]]]))
    counts = np.array([[[90, 10, 0, 0]], [[0, 0, 20, 20]]])
    device_of = spread(placement, [1, 2], [1, 2], counts).device_of[1]
    assert device_of.tolist() == [[0, -1, 1, 1]]


def test_no_expert_of_a_server_that_holds_none():
    resident = np.zeros((2, 1, 3), bool)
    resident[1] = True
    layout = spread(Placement(resident), [2, 1], [0, 3])
    assert (layout.device_of[0] == -1).all() and layout.experts_of(0, 1).shape == (0, 2)
    check_layout(layout, Placement(resident), (2, 1), (0, 3))


def test_from_policy_to_slots():
    counts = np.random.default_rng(1).integers(0, 50, SHAPE)
    slots = (20, 8, 5)
    placement = place("dance", counts, np.multiply(DEVICES, slots))
    check_layout(spread(placement, DEVICES, slots, counts), placement, DEVICES, slots)


def test_malformed_inputs():
    placement = Placement(np.ones((2, 1, 4), bool))
    with pytest.raises(UserError, match="server 1 holds 4 experts in 3 slots"):
        spread(placement, [2, 1], [2, 3])
    with pytest.raises(UserError, match="needs a device"):
        spread(placement, [2, 0], [2, 4])
    with pytest.raises(UserError, match="of 2 servers"):
        spread(placement, [2], [2])
    with pytest.raises(UserError, match="do not fit"):
        spread(placement, [2, 1], [2, 4], np.ones((2, 1, 3)))
    with pytest.raises(UserError, match="not finite"):
        spread(placement, [2, 1], [2, 4], np.full((2, 1, 4), np.nan))


def random_placement(rng, capacities, shape=SHAPE):
    """Covers everything and fills all slots."""
    servers, layers, experts = shape
    resident = np.zeros((servers, layers * experts), bool)
    for expert in rng.permutation(layers * experts):
        free = np.flatnonzero(resident.sum(1) < capacities)
        resident[rng.choice(free), expert] = True
    for held, capacity in zip(resident, capacities, strict=True):
        held[rng.permutation(np.flatnonzero(~held))[: capacity - held.sum()]] = True
    return Placement(resident.reshape(shape))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(13, 5, 4), (16, 8, 5), (32, 16, 11)]))
def test_those_that_stay_keep_their_slots(seed, slots):
    rng = np.random.default_rng(seed)
    capacities = np.multiply(DEVICES, slots)
    # The first leaves slots empty, the second does not.
    old = random_placement(rng, capacities - rng.integers(0, 2, 3))
    new = random_placement(rng, capacities)
    counts = rng.gamma(0.5, size=SHAPE)
    before = spread(old, DEVICES, slots, counts)
    after = spread(new, DEVICES, slots, counts, previous=before)
    stays = old.resident & new.resident
    assert stays.any()
    assert (after.device_of[stays] == before.device_of[stays]).all()
    assert (after.slot_of[stays] == before.slot_of[stays]).all()
    assert ((after.device_of >= 0) == new.resident).all()
    assert (after.resident == new.resident).all()
    for server, (devices, size) in enumerate(zip(DEVICES, slots, strict=True)):
        tables = [after.experts_of(server, device) for device in range(devices)]
        assert all(table.shape == (size, 2) for table in tables)
        # No two in one slot: all are found again.
        assert sum(int((table[:, 0] >= 0).sum()) for table in tables) == new.resident[server].sum()


def test_nothing_moves_where_nothing_changes():
    counts = np.random.default_rng(2).gamma(0.5, size=SHAPE)
    placement = place("dance", counts, np.multiply(DEVICES, (20, 8, 5)))
    before = spread(placement, DEVICES, (20, 8, 5), counts)
    again = spread(placement, DEVICES, (20, 8, 5), counts[::-1], previous=before)
    assert (again.slot_of == before.slot_of).all() and (again.device_of == before.device_of).all()


def test_those_that_come_are_balanced_around_those_that_stay():
    counts = np.array([[[40, 10, 10, 10, 10]]])
    first = Placement(np.array([[[True, True, False, False, False]]] * 2))
    first = Placement(first.resident | (np.arange(2)[:, None, None] == 1))
    everything = Placement(np.ones((2, 1, 5), bool))
    counts = np.concatenate([counts, counts])
    before = spread(first, [2, 1], [4, 5], counts)
    assert before.device_of[0, 0].tolist() == [0, 1, -1, -1, -1]
    after = spread(everything, [2, 1], [4, 5], counts, previous=before)
    assert after.device_of[0, 0].tolist() == [0, 1, 1, 1, 1]


def test_previous_of_other_slots():
    placement = Placement(np.ones((2, 1, 4), bool))
    before = spread(placement, [1, 1], [4, 4])
    with pytest.raises(UserError, match="previous layout"):
        spread(placement, [1, 1], [4, 5], previous=before)


def test_those_that_come_take_empty_slots_first():
    held = np.zeros((2, 1, 6), bool)
    held[0, 0, :3] = held[1] = True
    before = spread(Placement(held), [1, 1], [4, 6])
    held[0, 0] = [0, 0, 1, 1, 1, 0]
    after = spread(Placement(held), [1, 1], [4, 6], previous=before)
    # Slot 3 was empty, slots 0 and 1 are left.
    assert sorted(after.slot_of[0, 0, 2:5].tolist()) == [0, 2, 3]
    assert after.slot_of[0, 0, 2] == 2
