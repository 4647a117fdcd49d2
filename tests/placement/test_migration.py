"""Batches between layouts, and whether they pay."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.engine.route_sample import RouteSample
from dance_jax.placement.core import Layout, Placement
from dance_jax.placement.cost import CallCost
from dance_jax.placement.decay import DecayedCounts
from dance_jax.placement.devices import spread
from dance_jax.placement.migration import (
    ERRORS,
    HYSTERESIS,
    MoveBatch,
    NoEmptySlot,
    SlotChange,
    batches,
    changed,
    decide,
    gain_error,
    halves,
    migration_seconds,
    seconds_per_token,
    worth,
)
from dance_jax.placement.policies import place
from tests.placement.test_spread import random_placement

SHAPE, DEVICES = (3, 4, 8), (1, 1, 2)


def same(one: Layout, other: Layout) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(Layout)
    )


def tables(layout: Layout) -> dict[tuple[int, int], np.ndarray]:
    """A copy of what is in every device's slots, as an engine has it."""
    return {
        (server, device): layout.experts_of(server, device).copy()
        for server, devices in enumerate(layout.devices)
        for device in range(devices)
    }


def replay(old: Layout, new: Layout, most: int) -> list[int]:
    """Applies all batches, checking each; most loads of a device in each."""
    loads, layout = [], old
    for batch, after in batches(old, new, most):
        assert len({change[:3] for change in batch.changes}) == len(batch.changes) > 0
        before = tables(layout)
        per_device = dict.fromkeys(before, 0)
        for server, device, slot, layer, _ in batch.changes:
            # Loads go to slots that are empty; what leaves is still there.
            assert (before[server, device][slot, 0] < 0) == (layer >= 0)
            per_device[server, device] += layer >= 0
        for device, table in before.items():
            empty = int((table[:, 0] < 0).sum())
            assert per_device[device] <= min(most, empty)
            keeps_one = min(empty, (tables(new)[device][:, 0] < 0).sum()) > 0
            assert (tables(after)[device][:, 0] < 0).any() or not keeps_one
        assert same(changed(layout, batch.changes), after)
        layout = after
        Placement(layout.resident).validate()
        loads.append(max(per_device.values()))
    assert (layout.device_of == new.device_of).all()
    stays = old.device_of == new.device_of
    assert (layout.slot_of == old.slot_of)[stays].all()
    return loads


def loads_needed(old: Layout, new: Layout) -> int:
    """Of the device that lacks most."""
    arrives = (new.device_of >= 0) & (new.device_of != old.device_of)
    return max(
        int((arrives[server] & (new.device_of[server] == device)).sum())
        for server, device in tables(old)
    )


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    slots=st.sampled_from([(12, 12, 5), (12, 12, 8), (33, 20, 12)]),
    spare=st.integers(1, 3),
    most=st.integers(1, 5),
    keep=st.booleans(),
)
def test_no_batch_loses_an_expert(seed, slots, spare, most, keep):
    rng = np.random.default_rng(seed)
    capacities = np.multiply(DEVICES, slots)
    slots = tuple(np.add(slots, spare).tolist())
    old = spread(random_placement(rng, capacities), DEVICES, slots, spare=spare)
    target = random_placement(rng, capacities - rng.integers(0, 1 + (sum(capacities) > 36), 3))
    # Without previous residents also change their devices on a server.
    previous = old if keep else None
    new = spread(target, DEVICES, slots, rng.random(SHAPE), previous, spare)
    loads = replay(old, new, most)
    # Few: what the busiest device loads, and a batch or two where others must go first.
    assert len(loads) <= -(-loads_needed(old, new) // min(spare, most)) + 2
    again = batches(old, new, most)
    assert [batch for batch, _ in again] == [batch for batch, _ in batches(old, new, most)]


def test_few_batches():
    """With room to spare no more than the loads of the busiest device need."""
    rng = np.random.default_rng(0)
    shape, slots = (3, 6, 32), (100, 100, 50)
    capacities = np.multiply(DEVICES, np.subtract(slots, 4))
    old = spread(random_placement(rng, capacities, shape), DEVICES, slots, spare=4)
    target = random_placement(rng, capacities, shape)
    new = spread(target, DEVICES, slots, previous=old, spare=4)
    assert 4 < len(replay(old, new, 4)) == -(-loads_needed(old, new) // 4)


def layout_of(slots: int, *experts: list[int]) -> Layout:
    """Of one layer: what each server holds."""
    total = 1 + max(map(max, experts))
    held = Placement.of_lists([[each] for each in experts], total)
    return spread(held, [1] * len(experts), [slots] * len(experts))


def test_last_copies_that_change_places_do_so_at_once():
    """One spare slot on each device is enough, for any number in a circle."""
    old, new = layout_of(2, [0], [1], [2]), layout_of(2, [1], [2], [0])
    ((batch, _),) = batches(old, new, 1)
    assert len(batch.loads()) == 3
    assert replay(layout_of(3, [0, 1], [2, 3]), layout_of(3, [3, 2], [0, 1]), 1) == [1, 1]
    assert replay(layout_of(4, [0, 1], [2, 3]), layout_of(4, [3, 2], [0, 1]), 2) == [2]


def test_chains_end_where_there_is_room():
    """Each expert moves on to the next server, and the last of them has room."""
    old, new = layout_of(3, [0, 1], [2, 3], [4]), layout_of(3, [5, 0], [1, 2], [3, 4])
    old = layout_of(3, [0, 1], [2, 3], [4, 5])
    assert replay(old, new, 1) == [1]


def test_the_last_slot_is_filled_by_the_last_load():
    everything = list(range(4))
    assert replay(layout_of(4, [0, 1], everything), layout_of(4, everything, [0]), 4) == [2]
    assert replay(layout_of(4, [0, 1, 2], everything), layout_of(4, [0, 1, 3, 2], [0]), 4) == [1]


def test_no_empty_slot():
    old, new = layout_of(2, [0, 1], [2]), layout_of(2, [0, 2], [1])
    with pytest.raises(NoEmptySlot, match="server 0, device 0: no slot is empty"):
        batches(old, new, 1)
    assert replay(old, layout_of(2, [0], [1, 2]), 1) == [1]


def test_only_emptied_slots_cost_no_load():
    old = spread(Placement(np.ones((2, 1, 3), bool)), [1, 1], [3, 3])
    fewer = Placement(np.array([[[True, False, True]], [[False, True, True]]]))
    ((batch, after),) = batches(old, spread(fewer, [1, 1], [3, 3], previous=old), 1)
    assert batch.loads() == () and len(batch.changes) == 2
    assert migration_seconds([batch], 1e9, [1.0, 1.0]) == 0
    assert Placement(after.device_of >= 0) == fewer
    assert batches(old, old, 1) == []


def test_malformed_changes():
    layout = spread(Placement(np.ones((2, 1, 3), bool)), [1, 1], [4, 3])
    for change, match in [
        (SlotChange(0, 0, 4, 0, 0), "no such"),
        (SlotChange(0, 1, 0, 0, 0), "no such"),
        (SlotChange(2, 0, 0, 0, 0), "no such"),
        (SlotChange(0, 0, 3, 0, 3), "no such"),
        (SlotChange(0, 0, 3, 1, 0), "no such"),
        (SlotChange(0, 0, 3, 0, -1), "no such"),
        (SlotChange(0, 0, 3, 0, 0), "twice on a server"),
    ]:
        with pytest.raises(ValueError, match=match):
            changed(layout, [change])
    emptied = SlotChange(0, 0, 0, -1, -1)
    with pytest.raises(ValueError, match="changes twice"):
        changed(layout, [emptied, emptied])
    with pytest.raises(ValueError, match="nowhere"):
        changed(layout, [emptied, SlotChange(1, 0, 0, -1, -1)])
    with pytest.raises(ValueError, match="at least 1"):
        batches(layout, layout, 0)
    other = spread(Placement(np.ones((2, 1, 3), bool)), [1, 1], [3, 3])
    with pytest.raises(ValueError, match="different"):
        batches(layout, other, 1)


def test_a_batch_waits_for_the_slowest_server():
    load = [SlotChange(n, 0, slot, 0, slot) for n, slot in [(0, 0), (0, 1), (1, 2)]]
    found = migration_seconds(
        [MoveBatch(tuple(load)), MoveBatch(tuple(load[:1]))], 100.0, [50.0, 10.0]
    )
    assert found == pytest.approx(10.0 + 2.0)
    with pytest.raises(ValueError, match="above 0"):
        migration_seconds([], 100.0, [0.0])


def test_what_pays():
    assert worth(2.0, 1.0, 100, 99.0) and not worth(2.0, 1.0, 100, 100.0)
    # No gain is large enough where it is a small part of what there is.
    assert worth(1.0, 0.94, 1e9, 0.0) and not worth(1.0, 0.96, 1e9, 0.0)
    assert worth(1.0, 0.96, 1e9, 0.0, hysteresis=0.01)
    assert not worth(1.0, 0.5, 0, 0.0) and not worth(1.0, 1.0, 100, 0.0, hysteresis=0.0)


def test_decisions_in_words():
    decision = decide(2.0, 1.0, 100, 10.0, experts_moved=7)
    assert decision.migrate and decision.gain == 0.5
    assert (decision.present_seconds, decision.expected_seconds) == (200.0, 100.0)
    small, dear = decide(1.0, 0.99, 100, 0.0, 7), decide(2.0, 1.0, 100, 500.0, 7)
    assert not small.migrate and "5% of the present" in small.reason
    assert not dear.migrate and "costs more" in dear.reason
    forced = decide(2.0, 1.0, 100, 500.0, 7, force=True)
    assert forced.migrate and forced.reason.startswith("forced, although")
    assert not decide(1.0, 1.0, 100, 0.0, experts_moved=0, force=True).migrate
    assert decide(1.0, 1.0, 0, 0.0, 1).gain == 0.0


def test_halves_share_no_token_but_an_only_one():
    routes = [np.arange(size).reshape(-1, 1, 1) for size in (5, 1, 0)]
    fit, judge = halves(routes)
    assert [part.ravel().tolist() for part in fit] == [[0, 2, 4], [0], []]
    assert [part.ravel().tolist() for part in judge] == [[1, 3], [0], []]


def test_halves_are_of_different_requests():
    """Neighbours choose alike: of 32 requests each is in one half, and the error of a gain says how
    much requests differ, not tokens."""
    rng = np.random.default_rng(0)
    old, new = (random_placement(rng, [16, 16, 16], (3, 3, 12)) for _ in range(2))
    request = np.repeat(np.arange(32), 8)
    for part in halves([request])[0] + halves([request])[1]:
        assert len(set(part.tolist())) == 16

    def measured(_):
        taste = rng.gumbel(size=(3, 64, 3, 12)).repeat(32, 1)
        routes = [np.argsort(3 * each + rng.gumbel(size=each.shape))[..., :2] for each in taste]
        before, after = (seconds_per_token(each, routes, Service.COST) for each in (old, new))
        return 1 - after / before, gain_error(old, new, routes, Service.COST)

    gains, errors = zip(*map(measured, range(30)), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(gains), rel=0.3)


def test_the_error_of_a_gain_of_few_tokens_or_none():
    rng = np.random.default_rng(0)
    old, new = (random_placement(rng, [16, 16, 16], (3, 3, 12)) for _ in range(2))
    assert gain_error(old, old, [np.zeros((64, 3, 2), int)] * 3, Service.COST) == 0
    assert gain_error(old, new, [np.zeros((7, 3, 2), int)] * 3, Service.COST) == np.inf


class Service:
    """Statistics and decisions of a service, without the service."""

    SHAPE = (3, 3, 12, 2)
    SLOTS, SPARE = (17, 17, 9), 1
    COST = CallCost(
        state=np.full(3, 1e-3),
        call=np.full(3, 1e-4),
        devices=np.array(DEVICES),
        round=np.full(3, 1e-3),
    )

    def __init__(self, half_life, seed=0):
        servers, layers, _, k = self.SHAPE
        self.rng = np.random.default_rng(seed)
        self.counts = DecayedCounts(half_life)
        self.samples = [RouteSample(512, (layers, k), n, half_life) for n in range(servers)]
        self.now, self.layout = 0.0, None
        self.preferences = self.rng.gumbel(size=self.SHAPE[:3])

    def interval(self, tokens=4000):
        """Ten parts of an interval of 300 s, then a decision; whether it migrated."""
        servers, layers, experts, k = self.SHAPE
        for _ in range(10):
            self.now += 30.0
            counts = np.zeros(self.SHAPE[:3])
            for n in range(servers):
                noise = self.rng.gumbel(size=(tokens // 10, layers, experts))
                routes = np.argsort(-(1.5 * self.preferences[n] + noise))[:, :, :k]
                self.samples[n].add(routes, self.now)
                for layer in range(layers):
                    counts[n, layer] = np.bincount(routes[:, layer].ravel(), minlength=experts)
            self.counts.add(counts, self.now)
        return self.decide(tokens)

    def decide(self, tokens):
        counts, old = self.counts.value(self.now), self.layout
        fit, judge = halves([sample.kept for sample in self.samples])
        present = None if old is None else Placement(old.device_of >= 0)
        found = place(
            "latency",
            counts,
            np.multiply(DEVICES, np.subtract(self.SLOTS, self.SPARE)),
            routes=fit,
            cost=self.COST,
            previous=present,
        )
        new = spread(found, DEVICES, self.SLOTS, counts, old, self.SPARE)
        if old is None or present is None:
            self.layout = new
            return True
        steps = batches(old, new, 8)
        new = steps[-1][1] if steps else old
        decision = decide(
            seconds_per_token(present, judge, self.COST),
            seconds_per_token(found, judge, self.COST),
            tokens,
            migration_seconds([batch for batch, _ in steps], 1e6, [1e9] * 3),
            found.moved(present),
            hysteresis=HYSTERESIS + ERRORS * gain_error(present, found, judge, self.COST),
        )
        if decision.migrate:
            self.layout = new
        return decision.migrate


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_a_stable_workload_never_migrates_and_a_shift_does_once():
    service = Service(half_life=60.0)
    assert service.interval()
    assert [service.interval() for _ in range(5)] == [False] * 5
    service.preferences = service.preferences[[1, 2, 0]]
    assert [service.interval() for _ in range(3)] == [True, False, False]
