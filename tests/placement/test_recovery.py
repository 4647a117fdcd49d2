"""Servers that are left load the experts of a lost one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dance_jax.placement.core import Layout, Placement
from dance_jax.placement.devices import spread
from dance_jax.placement.migration import MoveBatch, changed
from dance_jax.placement.recovery import recovery, restoration, uncovered

SERVERS = 3


@st.composite
def homes(draw: st.DrawFn) -> tuple[Layout, np.ndarray]:
    """A layout that has every expert, and calls."""
    layers, experts = 2, draw(st.sampled_from([2, 6]))
    devices = draw(st.sampled_from([[1, 1, 1], [2, 1, 1]]))
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    resident = random.random((SERVERS, layers, experts)) < draw(st.sampled_from([0.0, 0.4]))
    nowhere = np.logical_not(resident.any(0))
    resident[random.integers(SERVERS, size=nowhere.sum()), *nowhere.nonzero()] = True
    slots = [
        -(-int(own.sum()) // count) + draw(st.integers(0, 3))
        for own, count in zip(resident, devices, strict=True)
    ]
    layout = spread(Placement(resident), devices, slots)
    return layout, random.integers(0, 5, resident.shape).astype(float)


#: Servers that run, at least one; not all.
some = st.sets(st.integers(0, SERVERS - 1), min_size=1, max_size=SERVERS - 1)


def follow(
    layout: Layout, batches: list[MoveBatch], loaders: set[int], present: set[int], most: int
) -> Layout:
    """The layout after the batches, each of which is checked."""
    before = uncovered(layout, present)
    for batch in batches:
        for server, device, slot, layer, expert in batch.changes:
            assert server in loaders
            was = layout.experts_of(server, device)[slot, 0]
            assert was < 0 if layer >= 0 else was >= 0, "slots are emptied, then filled"
            if layer >= 0:
                assert not layout.resident[server, layer, expert]
        at = [change[:2] for change in batch.loads()]
        assert all(at.count(device) <= most for device in at)
        layout = changed(layout, batch.changes)
        after = uncovered(layout, present)
        assert not (after & ~before).any(), "no expert loses its last holder"
        before = after
    return layout


@given(homes(), some, st.integers(1, 3))
def test_what_can_be_loaded_is_loaded(
    home: tuple[Layout, np.ndarray], present: set[int], most: int
) -> None:
    first, calls = home
    layout = follow(first, recovery(first, first, present, calls, most), present, present, most)
    if uncovered(layout, present).any():
        held = layout.resident[sorted(present)]
        assert (held.sum(0) <= 1).all(), "a replica could have made room"
        slots = sum(layout.devices[n] * layout.slots_per_device[n] for n in present)
        assert held.sum() == slots
    lost = [n for n in range(SERVERS) if n not in present]
    np.testing.assert_array_equal(layout.slot_of[lost], first.slot_of[lost])


@given(homes(), st.lists(st.tuples(some, some), min_size=1, max_size=6), st.integers(1, 3))
def test_the_layout_is_as_before_when_all_are_back(
    home: tuple[Layout, np.ndarray], runs: list[tuple[set[int], set[int]]], most: int
) -> None:
    """Whichever servers were lost one after the other, and whichever of those left could load."""
    first, calls = home
    layout = first
    for present, may_load in runs:
        batches = recovery(layout, first, present, calls, most, may_load & present)
        layout = follow(layout, batches, may_load & present, present, most)
    everyone = {*range(SERVERS)}
    layout = follow(layout, restoration(layout, first, most), everyone, everyone, most)
    np.testing.assert_array_equal(layout.device_of, first.device_of)
    np.testing.assert_array_equal(layout.slot_of, first.slot_of)
    assert not restoration(layout, first, most)


def test_the_most_called_experts_come_first_and_go_to_their_users() -> None:
    """Of three lost experts, two find room, and the least called replica makes room for one."""
    resident = np.zeros((3, 1, 6), bool)
    resident[0, 0, [0, 1]] = resident[1, 0, [1, 2]] = resident[2, 0, [3, 4, 5]] = True
    layout = spread(Placement(resident), [1, 1, 1], [3, 2, 3])
    calls = np.zeros((3, 1, 6))
    calls[0, 0, 3], calls[1, 0, 4], calls[1, 0, 5] = 9, 3, 1
    batches = recovery(layout, layout, [0, 1], calls, 2)
    (first, *others) = batches
    assert [change[:2] + change[3:] for change in first.changes if change.loads] == [(0, 0, 0, 3)]
    for batch in batches:
        layout = changed(layout, batch.changes)
    assert uncovered(layout, [0, 1]).sum() == 1 and uncovered(layout, [0, 1])[0, 5]
    assert others


def test_copies_away_from_home_make_room_first() -> None:
    """Beta has loaded alpha's expert 0, the most called; once alpha is back, it is in the way."""
    resident = np.zeros((3, 1, 3), bool)
    resident[0, 0, [0, 1]] = resident[1, 0, 1] = resident[2, 0, 2] = True
    home = spread(Placement(resident), [1, 1, 1], [2, 2, 1])
    calls = np.ones((3, 1, 3))
    calls[:, 0, 0] = 9
    (batch,) = recovery(home, home, [1, 2], calls, 1)
    assert batch.changes == ((1, 0, 1, 0, 0),)
    emptied, filled = recovery(changed(home, batch.changes), home, [0, 1], calls, 1)
    assert emptied.changes == ((1, 0, 1, -1, -1),)
    assert filled.changes == ((1, 0, 1, 0, 2),)
