"""Experts follow what users ask for: the scheduler of a service, with engines that are made up."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
from typing import Any

import msgspec
import numpy as np
import pytest

from dance_jax.config import EngineConfig, UserError
from dance_jax.engine.report import EngineStats
from dance_jax.launch import protocol, rebalancer, state
from dance_jax.launch.costs import DEFAULT_RATE, Measured, cluster_cost, running_cost
from dance_jax.launch.hosts import parse_hosts
from dance_jax.launch.plan import Room, parse_layout
from dance_jax.launch.rebalance import (
    BATCH_BYTES,
    BATCH_EXPERTS,
    Answer,
    Question,
    RebalanceOptions,
    answer,
    most_loads,
    resident,
)
from dance_jax.launch.rebalancer import Rebalancer
from dance_jax.launch.solver import Solver, SolverError
from dance_jax.launch.workload import Statistics, Workload
from dance_jax.models import ModelConfig
from dance_jax.placement.core import Layout, Placement, spread
from tests.tiny_models import SERVED

SPEC = parse_hosts(
    "alpha address=localhost experts=20 bandwidth=1Mbps\n"
    "beta address=localhost experts=20 bandwidth=1Mbps"
)
MODEL = ModelConfig.from_hf(SERVED)
CONFIG = EngineConfig(max_model_len=64)
LAYERS, EXPERTS, K = 2, 16, 4
EXPERT_BYTES = 3 * 32 * 16 * 4
INTERVAL_S = 300.0


class Facts:
    """A checkpoint as planning sees it."""

    config = MODEL
    fingerprint = "f" * 64

    def expert_bytes(self, dtype: str) -> int:
        return EXPERT_BYTES

    def trunk_bytes(self, dtype: str) -> int:
        return 1


def halves(first: range) -> Layout:
    """Alpha holds these experts of every layer, beta the others; both have slots to spare."""
    held = np.zeros((2, LAYERS, EXPERTS), bool)
    held[0, :, first] = True
    held[1] = ~held[0]
    return spread(Placement(held), [1, 1], [20, 20])


def routes(experts: range, tokens: int = 400, seed: int = 0) -> np.ndarray:
    """Tokens that choose K of these experts in every layer."""
    rng = np.random.default_rng(seed)
    chosen = rng.permuted(np.tile(np.array(experts), (tokens * LAYERS, 1)), axis=1)[:, :K]
    return chosen.reshape(tokens, LAYERS, K).astype(np.int16)


def stats(tokens: np.ndarray, more: int = 1) -> EngineStats:
    """Of an engine that computed these tokens, `more` times; its sample has the latest."""
    counts = [np.bincount(tokens[:, layer].ravel(), minlength=EXPERTS) for layer in range(LAYERS)]
    return EngineStats(
        counts=(more * np.array(counts)).tolist(),
        transfers=[[0, 0]] * LAYERS,
        bytes_sent=[0, 0],
        tokens=more * len(tokens),
        steps=1,
        routes=tokens[-400:].tobytes(),
        top_k=K,
        pool_bytes=[0],
    )


#: What users of alpha and of beta ask for; it is at home where LOW is alpha's.
LOW, HIGH = range(8), range(8, 16)
AT_HOME = (routes(LOW), routes(HIGH))


class Inline:
    """Stands in for the process that solves: answers at once."""

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def ask(self, question: Question) -> concurrent.futures.Future[Answer]:
        self.asked.append(question)
        future: concurrent.futures.Future[Answer] = concurrent.futures.Future()
        try:
            future.set_result(answer(question))
        except UserError as error:
            future.set_exception(SolverError(str(error)))
        return future

    def close(self) -> None:
        pass


class Bench:
    """A rebalancer between front ends and engines that do as they are told.

    Args:
        directory: for the state; None: none is kept.
        fails: number of the batch that beta cannot load.
        more: options.
    """

    def __init__(
        self, monkeypatch: Any, directory: pathlib.Path | None = None, fails: int = 0, **more: Any
    ) -> None:
        self.now, self.fails = 1000.0, fails
        self.layout = halves(HIGH)  # the wrong way round
        #: What was said to each front end, and to users of the launch.
        self.told: list[list[Any]] = [[], []]
        self.said: list[str] = []
        self.tokens: tuple[np.ndarray, ...] = AT_HOME
        self.more = 1000
        #: The layout that each engine has in force, and batches that are staged there.
        self.in_force = [self.layout, self.layout]
        self.staged: list[set[int]] = [set(), set()]
        #: What front ends were told in the last run.
        self.history: list[list[Any]] = [[], []]
        self.solver = Inline()
        monkeypatch.setattr(rebalancer, "Solver", lambda: self.solver)
        options = RebalanceOptions(
            interval_s=INTERVAL_S,
            policy="dance",
            half_life_s=None,
            state_dir=None if directory is None else str(directory),
        )
        self.options = msgspec.structs.replace(options, **more)
        self.rebalancer = Rebalancer(
            self.options, SPEC, Facts(), CONFIG, self.layout, self, clock=lambda: self.now
        )
        self.rebalancer.tick()  # all engines run

    def tell(self, rank: int, command: Any) -> None:
        self.told[rank].append(protocol.decode_front_command(protocol.encode(command)))

    def tell_all(self, command: Any) -> None:
        for rank in range(2):
            self.tell(rank, command)

    def notice(self, name: str, text: str) -> None:
        self.said.append(f"{name}: {text}" if name else text)

    def run(self) -> None:
        """Until nothing is to be done any more."""
        done = [0, 0]
        self.rebalancer.tick()
        while any(done[rank] < len(self.told[rank]) for rank in range(2)):
            for rank in range(2):
                while done[rank] < len(self.told[rank]):
                    done[rank] += 1
                    self._obey(rank, self.told[rank][done[rank] - 1])
            self.rebalancer.tick()
        self.history, self.told = self.told, [[], []]

    def _obey(self, rank: int, command: Any) -> None:
        match command:
            case protocol.AskStats():
                found = msgspec.msgpack.encode(stats(self.tokens[rank], self.more))
                self._say(rank, protocol.Stats(msgspec.Raw(found)))
            case protocol.Stage(number, layout, loads):
                self._stage(rank, number, parse_layout(layout), loads)
            case protocol.Drop(number):
                self.staged[rank].discard(number)
                self._say(rank, protocol.Dropped(number))

    def _stage(self, rank: int, number: int, layout: Layout, loads: list[Any]) -> None:
        before = self.in_force[rank]
        for load in loads:
            assert before.device_of[rank, load.layer, load.expert] < 0
            assert before.device_of[load.holder, load.layer, load.expert] >= 0
            assert load.holder != rank
        if rank == 1 and number == self.fails:
            self._say(rank, protocol.StageFailed(number, "the disk is gone"))
            return
        self.staged[rank].add(number)
        self._say(rank, protocol.Staged(number, 0.5, len(loads) * EXPERT_BYTES))
        if all(number in staged for staged in self.staged):
            for each in range(2):
                self.in_force[each] = layout
                self._say(each, protocol.Applied(number))

    def _say(self, rank: int, event: protocol.Event) -> None:
        said = protocol.FromEngine(0, event)  # pyright: ignore[reportArgumentType]
        found = protocol.decode_front_event(protocol.encode(said))
        assert isinstance(found, protocol.FromEngine)
        self.rebalancer.receive(rank, found.event)

    def heard(self, kind: type, rank: int = 0) -> list[Any]:
        """What a front end was told in the last run, of one kind."""
        return [command for command in self.history[rank] if isinstance(command, kind)]


def local_share(layout: Layout) -> float:
    counts = np.array([stats(tokens).counts for tokens in AT_HOME])
    return resident(layout).local_share(counts)


def test_experts_move_to_where_they_are_used(monkeypatch) -> None:
    bench = Bench(monkeypatch)
    bench.run()
    assert bench.history == [[], []]  # nothing is due
    bench.now += INTERVAL_S
    assert local_share(bench.layout) == 0
    bench.run()
    # Slots are left over: everything that is used lives at home.
    assert local_share(bench.rebalancer.layout) == 1
    for layout in bench.in_force:
        np.testing.assert_array_equal(layout.device_of, bench.rebalancer.layout.device_of)
    stages = bench.heard(protocol.Stage)
    assert [stage.number for stage in stages] == list(range(1, len(stages) + 1))
    *_, last = bench.heard(protocol.Placed, rank=1)
    assert (last.version, last.migrations, last.failures) == (2, 1, 0)
    assert last.experts_migrated >= 2 * LAYERS * 8
    assert last.last_decision.migrate and last.last_decision.gain > 0.5
    assert last.last_decision.experts_moved == last.experts_migrated
    np.testing.assert_array_equal(
        parse_layout(last.layout).slot_of, bench.rebalancer.layout.slot_of
    )
    assert any("experts move" in text for text in bench.said)


def test_a_workload_that_stays_moves_nothing(monkeypatch) -> None:
    bench = Bench(monkeypatch, policy="latency")
    bench.now += INTERVAL_S
    bench.run()
    assert local_share(bench.rebalancer.layout) == 1
    for number in range(2, 12):
        bench.now += INTERVAL_S
        new = (routes(LOW, seed=number), routes(HIGH, seed=number))
        bench.tokens = tuple(map(np.concatenate, zip(bench.tokens, new, strict=True)))
        bench.run()
        assert not bench.heard(protocol.Stage)
        (placed,) = bench.heard(protocol.Placed)
        assert placed.version == 2 and not placed.last_decision.migrate


def test_a_shift_is_waited_out(monkeypatch) -> None:
    """What is due moves experts when it still pays, and would go to the same place."""
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
    assert local_share(bench.rebalancer.layout) == 1


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
        # The sample is of the last tokens.
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
    """With few tokens; whoever asks for it by force gets it."""
    bench = Bench(monkeypatch)
    bench.more = 1
    bench.tokens = (routes(LOW, tokens=40), routes(HIGH, tokens=40))
    bench.rebalancer._rates[:] = 1.0
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
    assert bench.rebalancer.layout is bench.layout
    bench.rebalancer.want(0, protocol.RebalanceWanted(9, force=True, dry_run=False))
    bench.run()
    (decided,) = bench.heard(protocol.Decided)
    assert decided.decision.migrate and decided.decision.forced
    assert local_share(bench.rebalancer.layout) > 0
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
    """The batch is dropped by all; those before it stay, and a later migration goes on."""
    bench = Bench(monkeypatch, fails=fails)
    bench.now += INTERVAL_S
    bench.run()
    assert [drop.number for drop in bench.heard(protocol.Drop)] == [fails]
    assert [drop.number for drop in bench.heard(protocol.Drop, rank=1)] == [fails]
    *_, last = bench.heard(protocol.Placed)
    assert (last.migrations, last.failures) == (0, 1)
    assert last.version == fails  # a batch before it did move experts
    assert last.last_decision.failure == "server beta: the disk is gone"
    assert (bench.rebalancer.layout is bench.layout) == (fails == 1)
    assert any(text.startswith("beta: experts do not move") for text in bench.said)
    bench.fails = 0
    bench.now += INTERVAL_S
    bench.run()
    assert bench.heard(protocol.Stage)[0].number == fails + 1
    *_, last = bench.heard(protocol.Placed)
    assert (last.version, last.migrations, last.failures) == (fails + 1, 1, 1)
    assert local_share(bench.rebalancer.layout) == 1


def test_a_server_that_never_loads(monkeypatch) -> None:
    """The batch is given up; serving goes on, and the next decision comes in its time."""
    bench = Bench(monkeypatch)
    stage = bench._stage
    monkeypatch.setattr(bench, "_stage", lambda rank, *rest: rank or stage(rank, *rest))
    bench.now += INTERVAL_S
    bench.run()
    assert bench.heard(protocol.Stage, rank=1) and not bench.heard(protocol.Drop)
    bench.now += rebalancer.LOAD_TIMEOUT_S
    bench.run()
    assert [drop.number for drop in bench.heard(protocol.Drop, rank=1)] == [1]
    *_, last = bench.heard(protocol.Placed)
    assert (last.version, last.migrations, last.failures) == (1, 0, 1)
    assert "beta: have not loaded them in 300 s" in last.last_decision.failure
    monkeypatch.setattr(bench, "_stage", stage)
    bench.now += INTERVAL_S
    bench.run()
    assert bench.heard(protocol.Placed)[-1].migrations == 1
    assert local_share(bench.rebalancer.layout) == 1


def test_a_batch_that_is_in_force_when_it_is_given_up(monkeypatch) -> None:
    """All servers have agreed on it just before they were told: what is in force counts."""
    bench = Bench(monkeypatch)
    say, held_back = bench._say, []

    def late(rank: int, event: Any) -> None:
        if isinstance(event, protocol.Applied) and event.number == 1:
            held_back.append((rank, event))
        elif isinstance(event, protocol.Dropped):
            while held_back:
                say(*held_back.pop(0))
            say(rank, event)
        else:
            say(rank, event)

    monkeypatch.setattr(bench, "_say", late)
    bench.now += INTERVAL_S
    bench.run()
    assert len(held_back) == 2
    bench.now += rebalancer.LOAD_TIMEOUT_S
    bench.run()
    assert bench.heard(protocol.Drop)
    *_, last = bench.heard(protocol.Placed)
    assert (last.migrations, last.failures) == (1, 0)
    assert local_share(bench.rebalancer.layout) == 1
    np.testing.assert_array_equal(bench.in_force[0].slot_of, bench.rebalancer.layout.slot_of)


def test_engines_that_die_meanwhile(monkeypatch) -> None:
    """What all have in force stays, and who asked is answered by the next engines."""
    bench = Bench(monkeypatch)
    bench.rebalancer.want(0, protocol.RebalanceWanted(1, force=False, dry_run=True))
    bench.rebalancer.tick()
    bench.rebalancer.engines_died()
    bench.told = [[], []]
    bench.run()
    (decided,) = bench.heard(protocol.Decided)
    assert decided.id == 1
    # Beta has the first batch in force, alpha dies before it says so.
    bench.now += INTERVAL_S
    say, number = bench._say, []

    def lose(rank: int, event: Any) -> None:
        if rank == 0 and isinstance(event, protocol.Applied):
            number.append(event.number)
        else:
            say(rank, event)

    monkeypatch.setattr(bench, "_say", lose)
    bench.run()
    assert number == [1] and bench.rebalancer.layout is bench.layout
    bench.rebalancer.engines_died()
    monkeypatch.setattr(bench, "_say", say)
    bench.in_force, bench.staged = [bench.layout] * 2, [set(), set()]
    bench.now += INTERVAL_S
    bench.run()
    assert bench.heard(protocol.Stage)[0].number == 1
    assert local_share(bench.rebalancer.layout) == 1


def test_nobody_has_asked_for_anything(monkeypatch) -> None:
    bench = Bench(monkeypatch)
    bench.tokens = (np.zeros((0, LAYERS, K), np.int16),) * 2
    bench.now += INTERVAL_S
    bench.run()
    (placed,) = bench.heard(protocol.Placed)
    assert not placed.last_decision.migrate and placed.last_decision.gain is None
    assert "nobody has asked" in placed.last_decision.reason


def test_zero_means_on_request_alone(monkeypatch) -> None:
    bench = Bench(monkeypatch, interval_s=0.0)
    bench.now += 1e6
    bench.run()
    assert bench.history == [[], []]


def test_experts_go_where_they_are_wanted(monkeypatch) -> None:
    """Also before anybody has asked for anything, and without slots that are only emptied."""
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
    assert resident(bench.rebalancer.layout) == resident(halves(LOW))
    np.testing.assert_array_equal(bench.in_force[1].slot_of, bench.rebalancer.layout.slot_of)
    assert not want(halves(LOW)).migrate
    more = halves(LOW)
    both = Placement((more.device_of >= 0) | np.isin(np.arange(EXPERTS), [3, 12]))
    want(spread(both, [1, 1], [20, 20]))
    assert resident(bench.rebalancer.layout) == both
    assert want(halves(LOW)).migrate
    assert resident(bench.rebalancer.layout) == resident(halves(LOW))


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
    np.testing.assert_array_equal(saved.layout.slot_of, bench.rebalancer.layout.slot_of)
    # What is asked for afterwards is known too.
    bench.more = 3000
    bench.rebalancer.drain()
    assert not bench.rebalancer.settled
    bench.rebalancer.want(0, protocol.RebalanceWanted(1, force=True, dry_run=False))
    bench.run()
    assert bench.rebalancer.settled
    (decided,) = bench.heard(protocol.Decided)
    assert decided.decision is None
    kept = state.load(tmp_path)
    assert kept is not None
    assert kept.statistics.counts.sum() == 3 * saved.statistics.counts.sum() > 0
    room = Room("", 1, 1, 1, 1, 20)
    assert kept.misfit(SPEC, Facts(), [room, room]) == ""
    resumed = state.resumed_plan(SPEC, Facts(), CONFIG, kept)
    assert resumed.local_share == 1
    # The next service goes on with both.
    again = Rebalancer(
        bench.options, SPEC, Facts(), CONFIG, kept.layout, bench, kept.statistics,
        clock=lambda: bench.now,
    )  # fmt: skip
    found = again._workload.statistics(bench.now)
    np.testing.assert_array_equal(found.counts, kept.statistics.counts)
    for ours, theirs in zip(found.routes, kept.statistics.routes, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_state_of_something_else(tmp_path: pathlib.Path) -> None:
    assert state.load(tmp_path) is None
    empty = Statistics(np.zeros((2, LAYERS, EXPERTS)), (AT_HOME[0][:0],) * 2)
    state.State(SPEC.names, "f" * 64, halves(LOW), empty).save(tmp_path)
    kept = state.load(tmp_path)
    assert kept is not None
    room, other = Room("", 1, 1, 1, 1, 20), Room("", 1, 1, 1, 1, 19)
    named = parse_hosts("alpha address=localhost experts=20\ngamma address=localhost experts=20")
    assert "servers alpha, beta" in kept.misfit(named, Facts(), [room, room])
    assert "slots" in kept.misfit(SPEC, Facts(), [room, other])
    model: Any = dataclasses.make_dataclass("Other", ["fingerprint"])("g")
    assert "another model" in kept.misfit(SPEC, model, [room, room])
    (tmp_path / state.FILE_NAME).write_bytes(b"torn")
    with pytest.raises(UserError, match=r"placement\.npz: not a readable state"):
        state.load(tmp_path)


def test_a_process_solves(monkeypatch) -> None:
    """It gives the same answer, and says what is wrong; nothing of it is left."""
    bench = Bench(monkeypatch)
    bench.rebalancer.want(0, protocol.RebalanceWanted(1, force=False, dry_run=True))
    bench.run()
    (question,) = bench.solver.asked
    solver = Solver()
    try:
        with pytest.raises(SolverError, match="unknown policy 'none'"):
            solver.ask(dataclasses.replace(question, policy="none")).result(120)
        first = solver._process
        found, expected = solver.ask(question).result(120), answer(question)
        assert solver._process is first
        assert found.decision == expected.decision
        assert [batch for batch, _ in found.batches] == [batch for batch, _ in expected.batches]
        assert first is not None
        first.kill()
        first.wait()
        # The next question starts another.
        with pytest.raises(SolverError, match="unknown policy 'none'"):
            solver.ask(dataclasses.replace(question, policy="none")).result(120)
        last = solver._process
        assert last is not None and last is not first
    finally:
        solver.close()
    assert last.poll() is not None


def test_batches_are_small() -> None:
    assert most_loads(BATCH_BYTES + 1) == 1
    assert most_loads(BATCH_BYTES // 3) == 3
    assert most_loads(1) == BATCH_EXPERTS


def test_what_is_measured_comes_first() -> None:
    measured = [Measured(byte_s=8e-6), Measured(call_s=1e-3)]
    cost = running_cost(SPEC, MODEL, CONFIG, measured)
    given = parse_hosts(
        "alpha address=localhost experts=20 bandwidth=1Mbps\n"
        "beta address=localhost experts=20 bandwidth=1Mbps expert_time=1ms"
    )
    expected = cluster_cost(given, MODEL, CONFIG)
    for field in dataclasses.fields(cost):
        np.testing.assert_allclose(getattr(cost, field.name), getattr(expected, field.name))
    nothing = parse_hosts("a address=localhost experts=20\nb address=localhost experts=20")
    cost = running_cost(nothing, MODEL, CONFIG, [Measured()] * 2)
    np.testing.assert_allclose(cost.state, 2 * 8 * 128 / DEFAULT_RATE)


def test_old_work_fades() -> None:
    """A workload that has changed: after two half-lives a quarter of the old one is left, and the
    tokens a second are those of a steady flow, however often engines are asked."""
    work = Workload((1, LAYERS, EXPERTS), K, 100.0, None, 0.0)
    tokens, seconds = 0, 0.0
    per_second = 50
    counts = np.zeros((LAYERS, EXPERTS), np.int64)
    for wait in (300.0, 10.0, 290.0, 900.0):
        tokens, seconds = tokens + int(per_second * wait), seconds + wait
        counts[:, 0] += int(per_second * wait)
        sample = routes(LOW, 3).tobytes()
        found = EngineStats(counts.tolist(), [[0]] * LAYERS, [0], tokens, 1, sample, K, [0])
        work.update([msgspec.msgpack.encode(found)], seconds)
        np.testing.assert_allclose(work.token_rates(seconds), per_second, rtol=1e-6)
    before = work.statistics(seconds).counts.sum()
    np.testing.assert_allclose(work.statistics(seconds + 200.0).counts.sum(), before / 4)


def test_engines_before_count_on() -> None:
    """Counters of an engine that is started anew begin at 0, and its sample is small."""
    work = Workload((1, LAYERS, EXPERTS), K, None, None, 0.0)
    work.update([msgspec.msgpack.encode(stats(AT_HOME[0]))], 1.0)
    work.engines_died(1.0)
    few = routes(HIGH, tokens=10)
    work.update([msgspec.msgpack.encode(stats(few))], 2.0)
    found = work.statistics(2.0)
    assert found.counts.sum() == (len(AT_HOME[0]) + len(few)) * LAYERS * K
    assert len(found.routes[0]) == len(AT_HOME[0])
    np.testing.assert_array_equal(found.routes[0][: len(few)], few)
