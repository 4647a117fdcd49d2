"""Servers are lost and come back, one after the other and at the same time, at any moment."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dance_jax.launch.control import protocol
from dance_jax.launch.rebalance.batches import COMMIT_TIMEOUT_S, LOAD_TIMEOUT_S
from dance_jax.launch.rebalance.losses import RETRY_S
from dance_jax.placement.core import Layout, Placement
from dance_jax.placement.devices import spread
from dance_jax.placement.recovery import uncovered
from tests.launch.losses_bench import NAMES, RANKS, LossesBench
from tests.launch.rebalance_bench import EXPERTS, LAYERS

ALPHA, BETA, GAMMA = RANKS


def thirds(spare: int = 8, more: int = 0) -> Layout:
    """A third of the experts on each server, with so many empty slots, and `more` replicas."""
    resident = np.zeros((len(NAMES), LAYERS, EXPERTS), bool)
    for expert in range(EXPERTS):
        resident[expert % 3, :, expert] = True
    for rank in RANKS:
        resident[rank, 0, (rank + 1 + 3 * np.arange(more)) % EXPERTS] = True
    held = resident.sum((1, 2)).tolist()
    return spread(Placement(resident), [1, 1, 1], [each + spare for each in held])


def check_whole(bench: LossesBench, first: Layout) -> None:
    """All is as before all losses, in the launcher and on all servers."""
    assert bench.rebalancer.settled
    layouts = [bench.layout, *bench.views]
    if bench.placed is not None:  # something was lost or moved
        assert (bench.placed.short, bench.placed.absent) == ("", [])
        layouts.append(Layout.from_bytes(bench.placed.layout))
    for layout in layouts:
        np.testing.assert_array_equal(layout.device_of, first.device_of)
        np.testing.assert_array_equal(layout.slot_of, first.slot_of)


def check_covered(bench: LossesBench) -> None:
    """The servers that run have every expert."""
    assert not uncovered(bench.layout, bench.present).any()
    assert bench.held.all()


def test_a_server_is_lost_while_nothing_moves(monkeypatch) -> None:
    bench = LossesBench(monkeypatch, first := thirds())
    bench.kill_front(GAMMA)
    # The others are told in the same turn, all of it in one batch, to be loaded without rests.
    assert [rank for rank, _ in bench.staged] == [ALPHA, BETA]
    stages = [stage for _, stage in bench.staged]
    assert all(stage.urgent for stage in stages)
    assert sum(len(stage.loads) for stage in stages) == LAYERS * EXPERTS // 3
    assert bench.placed is not None and bench.placed.absent == [GAMMA]
    bench.settle()
    check_covered(bench)
    assert bench.placed.short == ""
    assert any("10 experts of lost servers are loaded" in text for text in bench.said)
    bench.all_back()
    check_whole(bench, first)


def decide(bench: LossesBench) -> None:
    """A user asks to have gamma's experts on alpha."""
    resident = bench.layout.resident.copy()
    resident[ALPHA] |= resident[GAMMA]
    lists = [[np.flatnonzero(e).tolist() for e in le] for le in resident]
    bench.rebalancer.want(ALPHA, protocol.RebalanceWanted(1, False, False, resident=lists))
    bench.turn()
    for rank in RANKS:
        bench.obey(rank, loads=0)  # they report their statistics


def test_a_server_is_lost_while_a_batch_loads(monkeypatch) -> None:
    bench = LossesBench(monkeypatch, first := thirds(spare=12))
    decide(bench)
    assert bench.staged and not bench.rebalancer.settled
    bench.obey(ALPHA, commands=1, loads=0)
    before = len(bench.staged)
    bench.kill_engine(GAMMA)
    assert len(bench.staged) > before
    bench.settle()
    check_covered(bench)
    assert any("the migration stops because an engine restarts" in text for text in bench.said)
    bench.all_back()
    check_whole(bench, first)


@pytest.mark.parametrize("lost", [ALPHA, BETA, GAMMA])
def test_a_server_is_lost_while_a_batch_commits(monkeypatch, lost: int) -> None:
    """All were told to apply the batch, so it counts: experts return to where it put them."""
    bench = LossesBench(monkeypatch, first := thirds(spare=12))
    decide(bench)
    for rank in RANKS:
        bench.obey(rank, loads=0)
        bench.obey(rank, commands=0)
    assert bench.layout is first
    bench.kill_engine(lost)
    after = bench.layout
    assert after is not first
    bench.settle()
    check_covered(bench)
    bench.all_back()
    check_whole(bench, after)


def test_two_servers_are_lost_one_after_the_other(monkeypatch) -> None:
    bench = LossesBench(monkeypatch, first := thirds(spare=24))
    bench.kill_front(GAMMA)
    bench.obey(ALPHA)
    bench.kill_front(BETA)
    bench.settle()
    assert bench.present == {ALPHA}
    check_covered(bench)
    bench.all_back()
    check_whole(bench, first)


def test_the_first_of_two_is_back_in_time_to_load(monkeypatch) -> None:
    """A server that is back takes experts of the other, once it knows what has changed."""
    bench = LossesBench(monkeypatch, first := thirds(spare=8))
    bench.kill_front(GAMMA)
    bench.settle()
    bench.kill_front(BETA)
    bench.settle()
    assert uncovered(bench.layout, bench.present).any() and bench.present == {ALPHA}
    bench.wait(6.0)
    bench.ready(GAMMA)
    bench.settle()
    check_covered(bench)
    bench.all_back()
    check_whole(bench, first)


def test_a_server_is_back_before_the_others_have_loaded(monkeypatch) -> None:
    """It never ended; what was loaded for it leaves again, and the rest is not loaded."""
    monkeypatch.setattr("dance_jax.launch.planning.loss.RECOVERY_BYTES", 1)
    bench = LossesBench(monkeypatch, first := thirds())
    bench.pause(GAMMA)
    loads = sum(len(stage.loads) for _, stage in bench.staged)
    assert loads == 2  # one of each server: there are five such batches
    bench.obey(ALPHA)
    bench.resume(GAMMA)
    bench.settle()
    check_whole(bench, first)
    assert sum(len(stage.loads) for _, stage in bench.staged) == loads


def test_a_server_is_back_while_it_is_told_what_has_changed(monkeypatch) -> None:
    """It stops once more before it has applied that. What it was told is withdrawn, so that it can
    be told all that has changed when it is back again.
    """
    bench = LossesBench(monkeypatch, first := thirds())
    bench.pause(GAMMA)
    bench.settle()
    bench.resume(GAMMA)
    bench.obey(GAMMA, loads=0)
    bench.pause(GAMMA)
    bench.settle()
    bench.resume(GAMMA)
    bench.all_back()
    check_whole(bench, first)
    assert not any("restarts" in text for text in bench.said)


def test_a_server_that_cannot_follow_restarts(monkeypatch) -> None:
    bench = LossesBench(monkeypatch, first := thirds())
    bench.pause(GAMMA)
    bench.settle()
    bench.resume(GAMMA)
    engine = bench.engines[GAMMA]
    assert engine is not None
    stage = protocol.decode_command(engine.inbox.popleft())
    assert isinstance(stage, protocol.Stage) and not stage.loads
    engine.send(protocol.StageFailed(stage.number, "no memory"))
    bench.turn()
    assert GAMMA not in bench.present
    assert "gamma restarts: it cannot follow the placement: no memory" in bench.said
    bench.all_back()
    check_whole(bench, first)


def test_a_server_that_does_not_follow_restarts(monkeypatch) -> None:
    bench = LossesBench(monkeypatch, first := thirds())
    bench.pause(GAMMA)
    bench.settle()
    bench.resume(GAMMA)
    bench.wait(LOAD_TIMEOUT_S)
    assert any(text.startswith("gamma restarts: it cannot follow") for text in bench.said)
    bench.all_back()
    check_whole(bench, first)


def test_not_enough_memory(monkeypatch) -> None:
    """Users hear so only when the whole server is gone; it ends when the server is back."""
    bench = LossesBench(monkeypatch, first := thirds(spare=1))
    bench.kill_engine(GAMMA)
    bench.settle()
    assert uncovered(bench.layout, bench.present).sum() == 8
    assert bench.placed is not None and bench.placed.short == ""
    bench.kill_front(GAMMA)  # before its engine is started again
    assert "no server has 8 of the model's experts while gamma is gone" in bench.placed.short
    bench.wait(1.0)
    bench.turn()
    assert bench.starting == [GAMMA] and not bench.gone
    assert bench.placed.short
    bench.ready(GAMMA)
    assert bench.placed.short == ""
    bench.all_back()
    check_whole(bench, first)


def test_a_load_that_fails_is_tried_again(monkeypatch) -> None:
    bench = LossesBench(monkeypatch, first := thirds())
    bench.broken.add(ALPHA)
    bench.kill_front(GAMMA)
    before = len(bench.staged)
    bench.settle()
    assert len(bench.staged) == before and uncovered(bench.layout, bench.present).any()
    assert any("alpha: migration cancelled" in text for text in bench.said)
    bench.broken.clear()
    bench.wait(RETRY_S - 0.1)
    assert len(bench.staged) == before
    bench.wait(0.2)
    assert len(bench.staged) > before
    bench.settle()
    check_covered(bench)
    bench.all_back()
    check_whole(bench, first)


def test_a_restoration_that_fails_is_tried_again(monkeypatch) -> None:
    """A survivor cannot load again what it gave up for experts of the lost server."""
    bench = LossesBench(monkeypatch, first := thirds(spare=1, more=5))
    bench.pause(GAMMA)
    bench.settle()
    assert (first.resident & ~bench.layout.resident).any()
    bench.broken |= {ALPHA, BETA}
    bench.resume(GAMMA)
    bench.settle()
    assert any("migration cancelled" in text for text in bench.said)
    bench.broken.clear()
    bench.wait(RETRY_S)
    bench.settle()
    check_whole(bench, first)


def test_a_restoration_that_a_loss_interrupts_goes_on_afterwards(monkeypatch) -> None:
    bench = LossesBench(monkeypatch, first := thirds(spare=1, more=5))
    bench.pause(GAMMA)
    bench.settle()
    bench.resume(GAMMA)
    bench.obey(GAMMA, loads=0)
    bench.obey(GAMMA, commands=0)
    bench.obey(GAMMA)  # it has followed
    for rank in RANKS:
        bench.obey(rank)
    bench.pause(BETA)
    bench.settle()
    bench.resume(BETA)
    bench.settle()
    check_whole(bench, first)


def test_a_server_whose_copies_are_needed_stays(monkeypatch) -> None:
    bench = LossesBench(monkeypatch, dataclasses.replace(thirds(spare=1), holders=2))
    assert bench.rebalancer.leaves(GAMMA).startswith("--survive 1 needs")
    bench.kill_front(BETA)
    assert bench.rebalancer.leaves(GAMMA) == "--survive 1 needs 2 servers"
    assert LossesBench(monkeypatch, thirds(spare=8)).rebalancer.leaves(GAMMA) == ""


def test_a_launcher_that_takes_over_knows_the_way_back(monkeypatch) -> None:
    """Gamma is lost under the first launcher, and comes back under the second."""
    bench = LossesBench(monkeypatch, first := thirds(spare=1, more=5))
    bench.kill_front(GAMMA)
    bench.settle()
    assert (first.resident & ~bench.layout.resident).any()
    bench.take_over()
    bench.settle()
    check_covered(bench)
    bench.all_back()
    check_whole(bench, first)


def test_a_draining_service_still_loads_for_its_requests(monkeypatch) -> None:
    bench = LossesBench(monkeypatch, thirds())
    bench.rebalancer.drain(engines_run=True)
    bench.kill_front(GAMMA)
    assert bench.staged and not bench.rebalancer.settled
    bench.settle()
    check_covered(bench)
    assert bench.rebalancer.settled
    staged = len(bench.staged)
    bench.wait(1.0)
    bench.ready(GAMMA)
    bench.settle()
    # Gamma learns what has changed, and no expert moves any more.
    assert all(rank == GAMMA and not stage.loads for rank, stage in bench.staged[staged:])
    assert bench.rebalancer.settled


def test_users_are_told_that_nothing_is_decided_meanwhile(monkeypatch) -> None:
    bench = LossesBench(monkeypatch, thirds())
    bench.kill_front(GAMMA)
    bench.settle()
    bench.rebalancer.want(ALPHA, protocol.RebalanceWanted(7, force=True, dry_run=False))
    bench.turn()
    assert [(each.id, each.why) for each in bench.decided] == [(7, "gamma does not run")]


class LossesMachine(RuleBasedStateMachine):
    """Servers are lost, come back, answer late and fail to load, and users ask for placements.

    Whatever happens, a server never loses the last copy of an expert, and is never told something
    that it cannot do (the bench asserts both). When the servers that run have done all that they
    were told, they have every expert for which their memory suffices. When all are back, all is as
    before the losses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()

    def teardown(self) -> None:
        try:
            if hasattr(self, "bench"):
                self.all_are_back()
        finally:
            self.patch.undo()

    @initialize(
        seed=st.integers(0, 1000),
        replicas=st.sampled_from([0.0, 0.1, 0.4]),
        spare=st.tuples(*[st.integers(1, 12)] * 3),
        small=st.booleans(),
    )
    def start(self, seed: int, replicas: float, spare: tuple[int, ...], small: bool) -> None:
        if small:  # batches of one expert on each server
            self.patch.setattr("dance_jax.launch.planning.loss.RECOVERY_BYTES", 1)
        random = np.random.default_rng(seed)
        resident = random.random((len(NAMES), LAYERS, EXPERTS)) < replicas
        home = random.integers(len(NAMES), size=(LAYERS, EXPERTS))
        resident[home, *np.indices((LAYERS, EXPERTS))] = True
        slots = [int(n) + more for n, more in zip(resident.sum((1, 2)), spare, strict=True)]
        self.home = spread(Placement(resident), [1, 1, 1], slots)
        self.bench = LossesBench(self.patch, self.home)
        #: The servers that ran after the last rule, and the experts that they had.
        self.before = self.bench.present, self.bench.held

    @rule(rank=st.sampled_from(RANKS), kind=st.sampled_from(["kill_engine", "kill_front", "pause"]))
    def a_server_is_lost(self, rank: int, kind: str) -> None:
        if rank in self.bench.present:
            getattr(self.bench, kind)(rank)

    @precondition(lambda self: self.bench.paused)
    @rule(data=st.data())
    def one_goes_on(self, data: st.DataObject) -> None:
        self.bench.resume(data.draw(st.sampled_from(sorted(self.bench.paused))))

    @precondition(lambda self: self.bench.paused)
    @rule(data=st.data())
    def a_stopped_engine_is_killed(self, data: st.DataObject) -> None:
        self.bench.kill_engine(data.draw(st.sampled_from(sorted(self.bench.paused))))

    @precondition(lambda self: self.bench.starting)
    @rule(data=st.data())
    def one_is_ready(self, data: st.DataObject) -> None:
        self.bench.ready(data.draw(st.sampled_from(self.bench.starting)))

    @rule(rank=st.sampled_from(RANKS), commands=st.integers(0, 3), loads=st.integers(0, 2))
    def one_does_what_it_is_told(self, rank: int, commands: int, loads: int) -> None:
        self.bench.obey(rank, commands, loads)

    @rule(seconds=st.sampled_from([0.5, 6.0, COMMIT_TIMEOUT_S, LOAD_TIMEOUT_S]))
    def time_passes(self, seconds: float) -> None:
        self.bench.wait(seconds)

    @rule(rank=st.sampled_from(RANKS))
    def a_disk_breaks_or_is_mended(self, rank: int) -> None:
        self.bench.broken ^= {rank}

    @rule(seed=st.integers(0, 1000))
    def a_user_asks_for_a_placement(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        resident = self.home.resident[random.permutation(len(NAMES))]
        if (resident.sum((1, 2)) > self.bench.layout.capacities).any():
            resident = self.home.resident
        lists = [[np.flatnonzero(e).tolist() for e in le] for le in resident]
        wanted = protocol.RebalanceWanted(1, False, False, resident=lists)
        self.bench.rebalancer.want(ALPHA, wanted)
        self.bench.turn()

    @precondition(lambda self: self.bench.present)
    @rule()
    def another_launcher_takes_over(self) -> None:
        self.bench.take_over()
        self.home = self.bench.rebalancer._losses.home

    @rule()
    def all_do_what_they_are_told(self) -> None:
        self.bench.broken.clear()
        for _ in range(2):  # what fails now is tried again
            self.bench.settle()
            self.bench.wait(RETRY_S)
        self.bench.settle()
        layout, present = self.bench.layout, sorted(self.bench.present)
        if not present:
            return
        lacks = uncovered(layout, present)
        np.testing.assert_array_equal(lacks, ~self.bench.held)
        if lacks.any():
            held = layout.resident[present]
            assert (held.sum(0) <= 1).all(), "a replica could have made room"
            assert held.sum() == sum(layout.slots_per_device[rank] for rank in present)
        short = "" if self.bench.placed is None else self.bench.placed.short
        assert short or not (lacks.any() and self.bench.gone)
        assert lacks.any() or not short

    @rule()
    def all_are_back(self) -> None:
        self.bench.all_back()
        check_whole(self.bench, self.bench.rebalancer._losses.home)
        if not self.bench.decided:
            check_whole(self.bench, self.home)
        for engine in self.bench.engines:
            assert engine is not None and not engine.staging.ready, "a batch is left over"

    @invariant()
    def no_last_copy_is_given_up(self) -> None:
        if not hasattr(self, "bench"):
            return
        before, held = self.before
        self.before = self.bench.present, self.bench.held
        if before <= self.bench.present:  # or else a server took it along
            assert not (held & ~self.bench.held).any()


LossesMachine.TestCase.settings = settings(
    max_examples=15, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow]
)
TestLosses = LossesMachine.TestCase
