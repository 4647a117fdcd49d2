"""The rebalancer moves experts to follow users' requests, with made-up engines."""

from __future__ import annotations

import concurrent.futures
import pathlib
from typing import Any

import numpy as np
import pytest

from dance_jax.launch.control import protocol
from dance_jax.launch.planning.plan import Room
from dance_jax.launch.rebalance import batches, state
from dance_jax.launch.rebalance import controller as rebalancer
from dance_jax.launch.rebalance import decision as rebalance
from dance_jax.launch.rebalance.controller import Rebalancer
from dance_jax.launch.rebalance.decision import (
    resident,
)
from dance_jax.placement import migration
from dance_jax.placement.core import Layout, Placement
from dance_jax.placement.devices import spread
from tests.launch.rebalance_bench import (
    AT_HOME,
    CONFIG,
    EXPERTS,
    HIGH,
    INTERVAL_S,
    LAYERS,
    LOW,
    SPEC,
    Bench,
    Facts,
    K,
    halves,
    local_share,
    routes,
    tastes,
)


def test_experts_move_to_where_they_are_used(monkeypatch) -> None:
    bench = Bench(monkeypatch)
    bench.run()
    assert bench.history == [[], []]  # no decision is due yet
    bench.now += INTERVAL_S
    assert local_share(bench.first) == 0
    bench.run()
    # There are spare slots, so every expert in use is on the server of its users.
    assert local_share(bench.layout) == 1
    for layout in bench.in_force:
        np.testing.assert_array_equal(layout.device_of, bench.layout.device_of)
    stages = bench.heard(protocol.Stage)
    assert [stage.number for stage in stages] == list(range(1, len(stages) + 1))
    *before, last = bench.heard(protocol.Placed, rank=1)
    assert before and not last.target
    for placed in before:
        target = Layout.from_bytes(placed.target)
        np.testing.assert_array_equal(target.slot_of, bench.layout.slot_of)
    assert [server.name for server in last.last_decision.servers] == [*SPEC.names]
    held = [server.resident for server in last.last_decision.servers]
    assert held == resident(bench.layout).lists()
    assert (last.version, last.migrations, last.failures) == (2, 1, 0)
    assert last.experts_migrated >= 2 * LAYERS * 8
    assert last.last_decision.migrate and last.last_decision.gain > 0.5
    assert last.last_decision.experts_moved == last.experts_migrated
    np.testing.assert_array_equal(Layout.from_bytes(last.layout).slot_of, bench.layout.slot_of)
    assert any("experts move" in text for text in bench.said)


@pytest.mark.slow
@pytest.mark.parametrize("margin", [True, False])
def test_a_workload_that_stays_moves_nothing(monkeypatch, margin: bool) -> None:
    """New tokens of the same users suggest different placements again and again. The minimum gain
    keeps experts in place; without the minimum gain they move, so this test can fail.
    """
    if not margin:
        monkeypatch.setattr(rebalance, "HYSTERESIS", 0.0)
        monkeypatch.setattr(migration, "gain_error", lambda *_: 0.0)
    bench = Bench(monkeypatch, policy="latency")
    bench.tokens, gains, version = tastes(0), [], 1
    while len(gains) < 5 and version < 3:
        bench.now += INTERVAL_S
        bench.run()
        *_, placed = bench.heard(protocol.Placed)
        gains.append(placed.last_decision.gain)
        version = placed.version
        # The sample holds only the latest tokens.
        new = tastes(len(gains))
        bench.tokens = tuple(map(np.concatenate, zip(bench.tokens, new, strict=True)))
    assert gains[0] > 0.1, "the first decision moves experts to their users"
    assert max(gains[1:]) > 0
    assert version == (2 if margin else 3)


def test_a_shift_is_waited_out(monkeypatch) -> None:
    """A due decision moves experts only if the move still pays and goes to the same places."""
    bench = Bench(monkeypatch, half_life_s=INTERVAL_S / 5)
    bench.now += INTERVAL_S
    bench.run()
    (placed,) = bench.heard(protocol.Placed)
    assert not placed.last_decision.migrate and "changing" in placed.last_decision.reason
    assert placed.last_decision.gain > 0.5
    bench.now += INTERVAL_S / 5 - 1
    bench.run()
    assert not bench.history[0]
    bench.now += 1
    bench.run()
    assert bench.heard(protocol.Placed)[-1].version == 2
    assert local_share(bench.layout) == 1


def test_a_shift_that_goes_on_is_waited_out_for_an_interval(monkeypatch) -> None:
    bench = Bench(monkeypatch, half_life_s=INTERVAL_S / 5)
    bench.now += INTERVAL_S
    looks, even_odd = 0, (routes(range(0, 16, 2)), routes(range(1, 16, 2)))
    for number in range(10):
        bench.run()
        if bench.heard(protocol.Stage):
            break
        looks += len(bench.heard(protocol.Placed))
        bench.now += INTERVAL_S / 5
        # The sample holds only the latest tokens.
        new = (even_odd, AT_HOME)[number % 2]
        bench.tokens = tuple(map(np.concatenate, zip(bench.tokens, new, strict=True)))
    else:
        pytest.fail("nothing moved")
    assert 1 < looks <= 6


def test_users_do_not_wait(monkeypatch) -> None:
    bench = Bench(monkeypatch, half_life_s=INTERVAL_S / 5)
    bench.rebalancer.want(0, protocol.RebalanceWanted(1, force=False, dry_run=False))
    bench.run()
    (decided,) = bench.heard(protocol.Decided)
    assert decided.decision.migrate and bench.heard(protocol.Placed)[-1].version == 2


def test_a_migration_that_costs_more_than_it_gains(monkeypatch) -> None:
    """With few tokens no experts move, unless a user forces the migration."""
    bench = Bench(monkeypatch)
    bench.more = 1
    bench.tokens = (routes(LOW, tokens=40), routes(HIGH, tokens=40))
    bench.rebalancer._rates = {0: 1.0, 1: 1.0}
    bench.rebalancer.want(1, protocol.RebalanceWanted(7, force=False, dry_run=False))
    bench.run()
    (decided,) = bench.heard(protocol.Decided, rank=1)
    assert not bench.heard(protocol.Decided, rank=0)
    assert decided.id == 7 and not decided.decision.migrate
    assert "costs more" in decided.decision.reason
    bench.rebalancer.want(0, protocol.RebalanceWanted(8, force=True, dry_run=True))
    bench.run()
    (decided,) = bench.heard(protocol.Decided)
    assert decided.decision.migrate and decided.decision.dry_run
    assert bench.layout is bench.first
    bench.rebalancer.want(0, protocol.RebalanceWanted(9, force=True, dry_run=False))
    bench.run()
    (decided,) = bench.heard(protocol.Decided)
    assert decided.decision.migrate and decided.decision.forced
    assert local_share(bench.layout) > 0
    assert bench.heard(protocol.Placed)[-1].version == 2


def test_a_handful_of_tokens_moves_nothing(monkeypatch) -> None:
    bench = Bench(monkeypatch)
    bench.tokens = (routes(LOW, tokens=9), routes(HIGH, tokens=9))
    bench.now += INTERVAL_S
    bench.run()
    (placed,) = bench.heard(protocol.Placed)
    assert not placed.last_decision.migrate and "too few" in placed.last_decision.reason


def test_a_dry_run_says_what_would_move(monkeypatch) -> None:
    bench = Bench(monkeypatch, dry_run=True)
    bench.now += INTERVAL_S
    bench.run()
    assert not bench.heard(protocol.Stage)
    (placed,) = bench.heard(protocol.Placed)
    assert placed.last_decision.migrate and placed.last_decision.dry_run
    assert "experts would move (dry run)" in bench.said[-1]


@pytest.mark.parametrize("fails", [1, 2])
def test_a_server_that_cannot_load(monkeypatch, fails: int) -> None:
    """All servers drop the batch. Earlier batches stay, and a later migration goes on."""
    bench = Bench(monkeypatch, fails=fails)
    bench.now += INTERVAL_S
    bench.run()
    assert [drop.number for drop in bench.heard(protocol.Drop)] == [fails]
    assert [drop.number for drop in bench.heard(protocol.Drop, rank=1)] == [fails]
    *_, last = bench.heard(protocol.Placed)
    assert (last.migrations, last.failures) == (0, 1)
    assert last.version == fails  # an earlier batch did move experts
    assert last.last_decision.failure == "server beta: the disk is gone"
    assert (bench.layout is bench.first) == (fails == 1)
    assert any(text.startswith("beta: migration cancelled") for text in bench.said)
    bench.fails = 0
    bench.now += INTERVAL_S
    bench.run()
    assert bench.heard(protocol.Stage)[0].number == fails + 1
    *_, last = bench.heard(protocol.Placed)
    assert (last.version, last.migrations, last.failures) == (fails + 1, 1, 1)
    assert local_share(bench.layout) == 1


def test_engines_that_do_not_answer(monkeypatch) -> None:
    """The rebalancer does not wait for them forever, and the next decision comes on time."""
    bench = Bench(monkeypatch)
    say = bench._say
    monkeypatch.setattr(bench, "_say", lambda rank, event: rank or say(rank, event))
    bench.rebalancer.want(0, protocol.RebalanceWanted(1, force=True, dry_run=False))
    bench.run()
    assert not bench.heard(protocol.Decided)
    bench.now += rebalancer.ANSWER_TIMEOUT_S
    bench.run()
    (decided,) = bench.heard(protocol.Decided)
    assert decided.decision is None and decided.why.startswith("no statistics from beta")
    monkeypatch.setattr(bench, "_say", say)
    bench.now += INTERVAL_S
    bench.run()
    assert local_share(bench.layout) == 1


def test_only_so_many_wait(monkeypatch) -> None:
    bench = Bench(monkeypatch)
    for number in range(rebalancer.MOST_WAITING + 2):
        wanted = protocol.RebalanceWanted(number, force=False, dry_run=True)
        bench.rebalancer.want(number % 2, wanted)
    refused = [told[0] for told in bench.told]
    assert all(each.decision is None and "other requests wait" in each.why for each in refused)
    assert sum(map(len, bench.told)) == 2


def test_what_users_ask_does_not_put_off_what_is_due(monkeypatch) -> None:
    bench = Bench(monkeypatch)
    for _ in range(5):
        bench.now += INTERVAL_S / 5
        bench.rebalancer.want(0, protocol.RebalanceWanted(1, force=False, dry_run=True))
        bench.run()
    bench.run()
    assert local_share(bench.layout) == 1


def test_a_server_that_never_loads(monkeypatch) -> None:
    """The batch is given up. Serving goes on, and the next decision comes on time."""
    bench = Bench(monkeypatch)
    stage = bench._stage
    monkeypatch.setattr(bench, "_stage", lambda rank, *rest: rank or stage(rank, *rest))
    bench.now += INTERVAL_S
    bench.run()
    assert bench.heard(protocol.Stage, rank=1) and not bench.heard(protocol.Drop)
    bench.now += batches.LOAD_TIMEOUT_S
    bench.run()
    assert [drop.number for drop in bench.heard(protocol.Drop, rank=1)] == [1]
    *_, last = bench.heard(protocol.Placed)
    assert (last.version, last.migrations, last.failures) == (1, 0, 1)
    assert "beta: experts were not loaded within 300 s" in last.last_decision.failure
    monkeypatch.setattr(bench, "_stage", stage)
    bench.now += INTERVAL_S
    bench.run()
    assert bench.heard(protocol.Placed)[-1].migrations == 1
    assert local_share(bench.layout) == 1


def test_a_server_that_does_not_put_a_batch_in_force(monkeypatch) -> None:
    """The others do not wait for it long and go on with the next batch."""
    bench = Bench(monkeypatch)
    say = bench._say

    def late(rank: int, event: Any) -> None:
        if not (rank == 0 and isinstance(event, protocol.Applied) and event.number == 1):
            say(rank, event)

    monkeypatch.setattr(bench, "_say", late)
    bench.now += INTERVAL_S
    bench.run()
    assert [commit.number for commit in bench.heard(protocol.Commit)] == [1]
    bench.now += batches.COMMIT_TIMEOUT_S
    bench.run()
    assert bench.heard(protocol.Stage)[0].number == 2 and not bench.heard(protocol.Drop)
    *_, last = bench.heard(protocol.Placed)
    assert (last.migrations, last.failures) == (1, 0)
    assert local_share(bench.layout) == 1


def test_engines_that_die_meanwhile(monkeypatch) -> None:
    """The layout in force stays, and the restarted engines answer the user who asked."""
    bench = Bench(monkeypatch)
    bench.rebalancer.want(0, protocol.RebalanceWanted(1, force=False, dry_run=True))
    bench.rebalancer.tick()
    bench.rebalancer.engines_died([0, 1])
    bench.told = [[], []]
    bench.run()
    (decided,) = bench.heard(protocol.Decided)
    assert decided.id == 1
    # All servers are told to put the first batch in force; alpha dies before it confirms.
    bench.now += INTERVAL_S
    say, number = bench._say, []

    def lose(rank: int, event: Any) -> None:
        if rank == 0 and isinstance(event, protocol.Applied):
            number.append(event.number)
        else:
            say(rank, event)

    monkeypatch.setattr(bench, "_say", lose)
    bench.run()
    assert number == [1] and bench.layout is bench.first
    bench.rebalancer.engines_died([0])
    assert bench.layout is not bench.first
    np.testing.assert_array_equal(bench.layout.slot_of, bench.in_force[1].slot_of)
    monkeypatch.setattr(bench, "_say", say)
    bench.in_force, bench.staged = [bench.layout] * 2, [set(), set()]
    bench.now += INTERVAL_S
    bench.run()
    assert bench.heard(protocol.Stage)[0].number == 2
    assert local_share(bench.layout) == 1


def test_nobody_has_asked_for_anything(monkeypatch) -> None:
    bench = Bench(monkeypatch)
    bench.tokens = (np.zeros((0, LAYERS, K), np.int16),) * 2
    bench.now += INTERVAL_S
    bench.run()
    (placed,) = bench.heard(protocol.Placed)
    assert not placed.last_decision.migrate and placed.last_decision.gain is None
    assert "no requests so far" in placed.last_decision.reason


def test_nothing_is_solved_while_nobody_asks(monkeypatch) -> None:
    bench = Bench(monkeypatch)
    bench.tokens = AT_HOME[::-1]  # every expert is at the server of its users
    for _ in range(3):
        bench.now += INTERVAL_S
        bench.run()
    assert len(bench.solver.asked) == 1
    bench.more += 1
    bench.now += INTERVAL_S
    bench.run()
    assert len(bench.solver.asked) == 2
    bench.rebalancer.want(0, protocol.RebalanceWanted(1, force=False, dry_run=True))
    bench.run()
    assert len(bench.solver.asked) == 3  # users still get an answer
    # The earlier result is only valid for the layout of that time.
    elsewhere = [[np.flatnonzero(e).tolist() for e in le] for le in halves(LOW).device_of >= 0]
    bench.rebalancer.want(0, protocol.RebalanceWanted(2, False, False, resident=elsewhere))
    bench.run()
    bench.now += INTERVAL_S
    bench.run()
    assert len(bench.solver.asked) == 5


def test_zero_means_on_request_alone(monkeypatch) -> None:
    bench = Bench(monkeypatch, interval_s=0.0)
    bench.now += 1e6
    bench.run()
    assert bench.history == [[], []]


def test_experts_go_where_they_are_wanted(monkeypatch) -> None:
    """Even before the first user request, and without moves that would only empty slots."""
    bench = Bench(monkeypatch)
    bench.tokens = (np.zeros((0, LAYERS, K), np.int16),) * 2

    def want(layout: Layout) -> protocol.Decision:
        lists = [[np.flatnonzero(e).tolist() for e in le] for le in layout.device_of >= 0]
        wanted = protocol.RebalanceWanted(1, force=False, dry_run=False, resident=lists)
        bench.rebalancer.want(0, wanted)
        bench.run()
        (decided,) = bench.heard(protocol.Decided)
        return decided.decision

    found = want(halves(LOW))
    assert (found.migrate, found.policy, found.experts_moved) == (True, "request", 32)
    assert resident(bench.layout) == resident(halves(LOW))
    np.testing.assert_array_equal(bench.in_force[1].slot_of, bench.layout.slot_of)
    assert not want(halves(LOW)).migrate
    more = halves(LOW)
    both = Placement((more.device_of >= 0) | np.isin(np.arange(EXPERTS), [3, 12]))
    want(spread(both, [1, 1], [20, 20]))
    assert resident(bench.layout) == both
    version = bench.heard(protocol.Placed)[-1].version
    assert want(halves(LOW)).migrate
    assert resident(bench.layout) == resident(halves(LOW))
    assert bench.heard(protocol.Placed)[-1].version == version + 1


def test_no_placement_can_be_found(monkeypatch) -> None:
    bench = Bench(monkeypatch, policy="no such policy")
    bench.rebalancer.want(0, protocol.RebalanceWanted(1, force=True, dry_run=False))
    bench.run()
    (decided,) = bench.heard(protocol.Decided)
    assert not decided.decision.migrate and "no such policy" in decided.decision.reason


def test_a_service_that_ends_is_resumed(monkeypatch, tmp_path: pathlib.Path) -> None:
    bench = Bench(monkeypatch, tmp_path)
    bench.now += INTERVAL_S
    bench.run()
    saved = state.load(tmp_path)
    assert saved is not None
    np.testing.assert_array_equal(saved.layout.slot_of, bench.layout.slot_of)
    # Requests after the last migration are counted, too.
    bench.more = 3000
    bench.rebalancer.drain(engines_run=True)
    assert not bench.rebalancer.settled
    bench.rebalancer.want(0, protocol.RebalanceWanted(1, force=True, dry_run=False))
    bench.run()
    assert bench.rebalancer.settled
    (decided,) = bench.heard(protocol.Decided)
    assert decided.decision is None
    kept = state.load(tmp_path)
    assert kept is not None
    # Without fading, counts accumulate since the migration: 3,000 times minus the first 1,000.
    assert saved.statistics.counts.sum() == 0
    assert kept.statistics.counts.sum() == 2000 * sum(len(each) for each in AT_HOME) * LAYERS * K
    room = Room("", 1, 1, 1, 0, 1, 20, 1)
    assert kept.misfit(SPEC, Facts(), [room, room]) == ""
    resumed = state.resumed_plan(SPEC, Facts(), CONFIG, kept)
    assert resumed.local_share == 1
    # The next service continues with both, layout and statistics.
    again = Rebalancer(
        bench.options, SPEC, Facts(), CONFIG, bench, kept.statistics, clock=lambda: bench.now
    )  # fmt: skip
    found = again._workload.statistics(bench.now)
    np.testing.assert_array_equal(found.counts, kept.statistics.counts)
    for ours, theirs in zip(found.routes, kept.statistics.routes, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_service_that_ends_while_experts_move(monkeypatch, tmp_path: pathlib.Path) -> None:
    """The running batch comes into force, no other batch follows, and the state records this."""
    bench = Bench(monkeypatch, tmp_path)
    stage, staged = bench._stage, []

    def end(rank: int, *command: Any) -> None:
        if not staged:
            bench.rebalancer.drain(engines_run=True)
        staged.append(rank)
        stage(rank, *command)

    monkeypatch.setattr(bench, "_stage", end)
    bench.now += INTERVAL_S
    bench.run()
    assert staged == [0, 1] and bench.rebalancer.settled
    saved = state.load(tmp_path)
    assert saved is not None
    for layout in (bench.layout, *bench.in_force):
        np.testing.assert_array_equal(saved.layout.slot_of, layout.slot_of)
    assert 0 < local_share(saved.layout) < 1
    assert bench.heard(protocol.Placed)[-1].last_decision.failure == "the service is shutting down"


def test_a_service_that_ends_before_it_is_decided(monkeypatch, tmp_path: pathlib.Path) -> None:
    bench = Bench(monkeypatch, tmp_path)
    monkeypatch.setattr(bench.solver, "ask", lambda question: concurrent.futures.Future())
    bench.rebalancer.want(1, protocol.RebalanceWanted(7, force=True, dry_run=False))
    bench.run()
    assert not bench.rebalancer.settled
    bench.rebalancer.drain(engines_run=True)
    bench.run()
    assert bench.rebalancer.settled
    (decided,) = bench.heard(protocol.Decided, rank=1)
    assert (decided.id, decided.decision, decided.why) == (7, None, "the service is shutting down")
    saved = state.load(tmp_path)
    assert saved is not None and saved.statistics.counts.sum() > 0


def test_engines_that_die_as_the_service_ends(monkeypatch, tmp_path: pathlib.Path) -> None:
    """Counts since the last report are lost; what was known before is not."""
    bench = Bench(monkeypatch, tmp_path)
    bench.tokens = AT_HOME[::-1]
    bench.now += INTERVAL_S
    bench.run()
    assert state.load(tmp_path) is None  # no expert has moved
    bench.rebalancer.drain(engines_run=True)
    bench.rebalancer.engines_died([0, 1])
    assert bench.rebalancer.settled
    saved = state.load(tmp_path)
    assert saved is not None and saved.statistics.counts.sum() > 0
