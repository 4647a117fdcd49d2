"""Which batches a server accepts, and what it tells other servers about them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dance_jax.engine.staging import Experts, Staging, new_slots
from dance_jax.models.experts import ExpertFormat
from dance_jax.models.formats import WeightFormat
from dance_jax.models.layers import SILU
from dance_jax.placement.core import Layout, Placement
from dance_jax.placement.devices import spread
from dance_jax.placement.migration import SlotChange, changed

LAYERS, EXPERTS = 2, 4
#: A format with leaves of two types.
HALF = WeightFormat("bfloat16")
FORM = ExpertFormat(3, 2, HALF, HALF, HALF, SILU, bias=True)
RANK = 1


@pytest.fixture
def layout() -> Layout:
    """Server 0 holds all experts, server 1 none, each on two devices of three slots."""
    resident = np.zeros((2, LAYERS, EXPERTS), bool)
    resident[0] = True
    return spread(Placement(resident), (1, 2), (8, 3))


@pytest.fixture
def staging(layout: Layout) -> Staging:
    return Staging(layout, RANK, FORM)


def weights(*places: tuple[int, int], form: ExpertFormat = FORM) -> Experts:
    return {place: form.empty() for place in places}


def gains(layout: Layout, device: int, slot: int, layer: int, expert: int) -> Layout:
    return changed(layout, [SlotChange(RANK, device, slot, layer, expert)])


def test_slots_with_another_expert_are_new(layout: Layout):
    one = gains(layout, 1, 2, 0, 3)
    assert new_slots(layout, one, RANK) == {(1, 2)}
    assert new_slots(layout, one, 0) == new_slots(one, one, RANK) == set()
    assert new_slots(one, layout, RANK) == set(), "an emptied slot needs nothing"
    assert new_slots(one, gains(one, 1, 2, 1, 3), RANK) == {(1, 2)}, "the layer differs"


def test_batches_come_one_by_one_and_are_told_once(staging: Staging, layout: Layout):
    assert (staging.ready, staging.news, staging.tell()) == (0, False, 0)
    first = gains(layout, 0, 0, 0, 0)
    second = gains(first, 1, 1, 1, 1)
    staging.add(1, first, weights((0, 0)))
    staging.add(2, second, weights((1, 1)))
    assert not staging.news, "others may not have loaded it"
    staging.commit(2)
    assert staging.news and staging.tell() == 1
    assert not staging.news and staging.layout is layout
    batch = staging.take(1)
    assert batch.layout is first and [len(each) for each in batch.writes] == [1, 0]
    assert staging.layout is first and staging.news and staging.tell() == 2
    with pytest.raises(RuntimeError, match="agree on batch 3, here 2"):
        staging.take(3)


def test_a_dropped_batch_takes_along_what_builds_on_it(staging: Staging, layout: Layout):
    first = gains(layout, 0, 0, 0, 0)
    staging.add(1, first, weights((0, 0)))
    staging.add(2, gains(first, 0, 1, 0, 1), weights((0, 1)))
    staging.commit(1)
    staging.tell()
    assert staging.drop(1) and (staging.ready, staging.news) == (0, False)
    assert not staging.drop(2) and not staging.drop(7)
    with pytest.raises(ValueError, match="batch 2 after batch 2"):
        staging.add(2, first, weights((0, 0)))
    staging.add(3, first, weights((0, 0)))
    assert staging.tell() == 0
    staging.commit(3)
    assert staging.tell() == 3


def test_what_does_not_fit_is_refused_and_leaves_nothing(staging: Staging, layout: Layout):
    one = gains(layout, 0, 0, 0, 0)
    two = gains(one, 1, 0, 0, 1)
    other = dataclasses.replace(layout, slots_per_device=(8, 4))
    wide = dataclasses.replace(FORM, gate=WeightFormat("float32"))
    wrong_shape = {(0, 0): tuple(np.zeros((2, 2), np.float32) for _ in FORM.leaves)}
    for new, experts, wrong in [
        (other, weights(), "other servers or another model"),
        (two, weights((0, 0)), r"no weights for \(device, slot\) \(1, 0\)"),
        (one, weights((0, 0), (1, 0)), "device 1, slot 0: the layout has no expert there"),
        (one, weights((0, 0), (1, 9)), "the slot does not exist"),
        (one, weights((0, 0), form=wide), "weights have"),
        (one, wrong_shape, "weights have"),
    ]:
        with pytest.raises(ValueError, match=wrong):
            staging.add(1, new, experts)
        assert (staging.ready, staging.news) == (0, False)
    staging.add(1, two, weights((0, 0), (1, 0)))
    assert staging.ready == 1
