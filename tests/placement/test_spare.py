"""Slots that stay empty, so that experts can move."""

from __future__ import annotations

import numpy as np
import pytest

from dance_jax.placement.core import Placement
from dance_jax.placement.devices import spread
from dance_jax.placement.spare import MOST_SPARE, spare_slots


@pytest.mark.parametrize(
    ("slots", "devices", "experts", "spare"),
    [
        ((14, 11, 10), (1, 1, 2), 32, (1, 1, 1)),
        ((500, 40, 15), (1, 1, 1), 540, (MOST_SPARE, 2, 1)),
        # A server that has room for everything keeps what it does not need.
        ((32, 20), (1, 1), 32, (0, 1)),
        ((17, 20), (2, 1), 32, (1, 1)),
        ((64,), (1,), 32, (MOST_SPARE,)),
        # Coverage comes first, and takes from the largest reserves.
        ((100, 100), (1, 1), 195, (2, 3)),
        ((20, 20, 10), (1, 1, 1), 49, (0, 0, 1)),
        ((20, 20, 10), (1, 1, 1), 50, (0, 0, 0)),
        ((1, 0, 9), (1, 1, 1), 9, (0, 0, 0)),
        # A device that holds nothing is of no use.
        ((1, 2, 9), (1, 1, 1), 10, (0, 1, 1)),
    ],
)
def test_spare_slots(slots, devices, experts, spare):
    assert spare_slots(slots, devices, experts) == spare


@pytest.mark.parametrize(
    ("slots", "experts", "holders", "spare"),
    [
        ((20, 20, 20), 25, 2, (1, 1, 1)),
        # All copies come first. A server with room for everything keeps what it does not need.
        ((26, 13, 14), 25, 2, (1, 1, 1)),
        ((26, 13, 13), 25, 2, (1, 0, 1)),
        ((26, 13, 12), 25, 2, (1, 0, 0)),
        ((26, 12, 12), 25, 2, (1, 0, 0)),
    ],
)
def test_spare_slots_with_more_holders(slots, experts, holders, spare):
    assert spare_slots(slots, (1, 1, 1), experts, holders) == spare
    layout = spread(Placement(np.ones((3, 1, 12), bool)), [1] * 3, [30] * 3, holders=3)
    assert layout.capacities.tolist() == [29] * 3


def test_spare_slots_stay_empty_on_every_device():
    held = Placement(np.ones((2, 2, 8), bool))
    layout = spread(held, [3, 1], [7, 17], spare=[1, 1])
    for server, devices in enumerate(layout.devices):
        for device in range(devices):
            assert (layout.experts_of(server, device)[:, 0] < 0).any()
    assert layout.spare == (1, 1) and layout.capacities.tolist() == [18, 16]
