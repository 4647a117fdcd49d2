"""Servers that are left load the experts of a lost one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dance_jax.placement.core import Layout, Placement, spread
from dance_jax.placement.migration import changed
from dance_jax.placement.recovery import recovery, restoration, uncovered


@st.composite
def losses(draw: st.DrawFn) -> tuple[Layout, list[int], np.ndarray]:
    """A layout that has every expert, the servers that are left, and calls."""
    servers, layers, experts = 3, 2, draw(st.sampled_from([2, 6]))
    devices = draw(st.sampled_from([[1, 1, 1], [2, 1, 1]]))
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    resident = random.random((servers, layers, experts)) < 0.4
    nowhere = ~resident.any(0)
    resident[random.integers(servers, size=nowhere.sum()), *nowhere.nonzero()] = True
    slots = [
        -(-int(own.sum()) // count) + draw(st.integers(0, 3))
        for own, count in zip(resident, devices, strict=True)
    ]
    layout = spread(Placement(resident), devices, slots)
    lost = draw(st.sets(st.integers(0, servers - 1), min_size=1, max_size=servers - 1))
    calls = random.integers(0, 5, resident.shape).astype(float)
    return layout, sorted(set(range(servers)) - lost), calls


@given(losses(), st.integers(1, 3))
def test_what_can_be_loaded_is_loaded(
    loss: tuple[Layout, list[int], np.ndarray], most: int
) -> None:
    first, present, calls = loss
    layout, before = first, uncovered(first, present)
    for batch in recovery(first, present, calls, most):
        tables = {
            (n, d): layout.experts_of(n, d) for n in present for d in range(layout.devices[n])
        }
        for server, device, slot, layer, expert in batch.changes:
            assert server in present
            was = tables[server, device][slot, 0]
            assert was < 0 if layer >= 0 else was >= 0, "slots are emptied, then filled"
            if layer >= 0:
                assert before[layer, expert]
        for (n, d), _ in tables.items():
            assert sum(change[:2] == (n, d) for change in batch.loads()) <= most
        layout = changed(layout, batch.changes)
        after = uncovered(layout, present)
        assert not (after & ~before).any(), "no expert loses its last holder"
        before = after
    if before.any():
        held = layout.resident[present]
        assert (held.sum(0) <= 1).all(), "a replica could have made room"
        slots = sum(layout.devices[n] * layout.slots_per_device[n] for n in present)
        assert held.sum() == slots
    lost = [n for n in range(len(first.devices)) if n not in present]
    np.testing.assert_array_equal(layout.slot_of[lost], first.slot_of[lost])


@given(losses(), st.integers(1, 3))
def test_the_placement_is_as_before_when_all_are_back(
    loss: tuple[Layout, list[int], np.ndarray], most: int
) -> None:
    first, present, calls = loss
    layout = first
    for batch in recovery(first, present, calls, 4):
        layout = changed(layout, batch.changes)
    for batch in restoration(layout, first, most):
        layout = changed(layout, batch.changes)
    np.testing.assert_array_equal(layout.device_of, first.device_of)


def test_the_most_called_experts_come_first_and_go_to_their_users() -> None:
    """Of three lost experts, two find room, and the least called replica makes room for one."""
    resident = np.zeros((3, 1, 6), bool)
    resident[0, 0, [0, 1]] = resident[1, 0, [1, 2]] = resident[2, 0, [3, 4, 5]] = True
    layout = spread(Placement(resident), [1, 1, 1], [3, 2, 3])
    calls = np.zeros((3, 1, 6))
    calls[0, 0, 3], calls[1, 0, 4], calls[1, 0, 5] = 9, 3, 1
    batches = recovery(layout, [0, 1], calls, 2)
    (first, *others) = batches
    assert [change[:2] + change[3:] for change in first.changes if change.loads] == [(0, 0, 0, 3)]
    for batch in batches:
        layout = changed(layout, batch.changes)
    assert uncovered(layout, [0, 1]).sum() == 1 and uncovered(layout, [0, 1])[0, 5]
    assert others
