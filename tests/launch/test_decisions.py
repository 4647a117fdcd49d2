"""Inputs of placement decisions, and the process that makes the decisions."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest

from dance_jax.config import UserError
from dance_jax.engine.report import STEP_SIZES, EngineStats
from dance_jax.launch.control import protocol
from dance_jax.launch.planning.costs import (
    CALL_S,
    DEFAULT_RATE,
    DEFAULT_ROUND_TRIP,
    MeasuredCosts,
    ServerLoad,
    cluster_cost,
    running_cost,
)
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.launch.planning.plan import Room
from dance_jax.launch.rebalance import solver as solver_module
from dance_jax.launch.rebalance import state
from dance_jax.launch.rebalance.decision import (
    BATCH_BYTES,
    BATCH_EXPERTS,
    answer,
    most_loads,
    resident,
)
from dance_jax.launch.rebalance.solver import Solver, SolverError
from dance_jax.launch.rebalance.workload import Statistics, Workload
from dance_jax.placement import migration
from dance_jax.placement.core import Placement
from dance_jax.placement.cost import CallCost, LockStepCost
from dance_jax.placement.devices import spread
from tests.launch.launched import eventually
from tests.launch.rebalance_bench import (
    AT_HOME,
    CONFIG,
    EXPERTS,
    HIGH,
    LAYERS,
    LOW,
    MODEL,
    SPEC,
    Bench,
    Facts,
    K,
    halves,
    routes,
    stats,
)


def test_a_state_of_something_else(tmp_path: pathlib.Path) -> None:
    assert state.load(tmp_path) is None
    empty = Statistics(np.zeros((2, LAYERS, EXPERTS)), (AT_HOME[0][:0],) * 2)
    state.ServiceState(SPEC.names, "f" * 64, halves(LOW), empty).save(tmp_path)
    kept = state.load(tmp_path)
    assert kept is not None
    room, other = (Room("", 1, 1, 1, 0, 1, slots, 1) for slots in (20, 19))
    named = parse_hosts("alpha address=localhost experts=20\ngamma address=localhost experts=20")
    assert "servers alpha, beta" in kept.misfit(named, Facts(), [room, room])
    assert "slots" in kept.misfit(SPEC, Facts(), [room, other])
    # A state of a version without spare slots.
    full = spread(Placement(np.ones((2, LAYERS, EXPERTS), bool)), [1, 1], [32, 32])
    whole = dataclasses.replace(kept, layout=full)
    assert "spare slots of alpha" in whole.misfit(
        SPEC, Facts(), [dataclasses.replace(room, slots=32)] * 2
    )
    model: Any = dataclasses.make_dataclass("Other", ["fingerprint"])("g")
    assert "another model" in kept.misfit(SPEC, model, [room, room])
    whole = bytearray((tmp_path / state.FILE_NAME).read_bytes())
    for broken in (b"torn", whole[: len(whole) // 2], *(_flipped(whole, n) for n in range(60))):
        (tmp_path / state.FILE_NAME).write_bytes(broken)
        # Not every flipped bit matters, but none may raise anything else.
        with contextlib.suppress(UserError):
            state.load(tmp_path)
    (tmp_path / state.FILE_NAME).write_bytes(b"torn")
    with pytest.raises(UserError, match=r"placement\.npz: is not a readable state"):
        state.load(tmp_path)


def _flipped(content: bytearray, seed: int) -> bytes:
    """The content with one bit flipped."""
    rng = np.random.default_rng(seed)
    changed = bytearray(content)
    changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def test_a_solver_that_cannot_start(monkeypatch) -> None:
    """The error is reported like any other failure of a solver."""

    def fails() -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(solver_module, "_start", fails)
    bench = Bench(monkeypatch)
    bench.rebalancer.want(0, protocol.RebalanceWanted(1, force=False, dry_run=True))
    bench.run()
    solver = Solver()
    try:
        with pytest.raises(SolverError, match="cannot be started: no more processes"):
            solver.ask(bench.solver.asked[0]).result(60)
    finally:
        solver.close()


def test_a_process_solves(monkeypatch) -> None:
    """The process gives the same answer, reports errors, and leaves nothing behind."""
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
        assert found.verdict == expected.verdict
        assert found.batches == expected.batches
        assert first is not None
        first.kill()
        first.wait()
        # The next question starts another process.
        with pytest.raises(SolverError, match="unknown policy 'none'"):
            solver.ask(dataclasses.replace(question, policy="none")).result(120)
        last = solver._process
        assert last is not None and last is not first
    finally:
        solver.close()
    assert last.poll() is not None


def test_a_process_without_an_answer_is_not_waited_for(monkeypatch) -> None:
    """As when the engines leave it no processor time; the user hears why nothing moves."""
    silent = "import time; time.sleep(600)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    monkeypatch.setattr(
        solver_module, "_start", lambda: subprocess.Popen([sys.executable, "-c", silent], **pipes)
    )
    monkeypatch.setattr(solver_module, "TIMEOUT_S", 0.1)
    bench, solver = Bench(monkeypatch), Solver()
    monkeypatch.setattr(bench.solver, "ask", solver.ask)
    bench.rebalancer.want(0, protocol.RebalanceWanted(1, force=False, dry_run=True))
    try:
        assert eventually(lambda: bench.run() or bench.heard(protocol.Decided))
        assert solver._process is not None and solver._process.poll() is not None
    finally:
        solver.close()
    (decided,) = bench.heard(protocol.Decided)
    assert not decided.decision.migrate
    assert "failed: no placement within 0.1 s: the launcher's" in decided.decision.reason


def test_servers_that_have_tokens_one_at_a_time(monkeypatch) -> None:
    """In lock step every transfer then counts, for the policy and in the verdict."""
    bench = Bench(monkeypatch)
    bench.rebalancer.want(0, protocol.RebalanceWanted(1, force=False, dry_run=True))
    bench.run()
    (question,) = bench.solver.asked
    assert question.busiest is None and isinstance(question.cost, CallCost)
    locked = cluster_cost(SPEC, MODEL, dataclasses.replace(CONFIG, exchange="collectives"))
    assert isinstance(locked, LockStepCost)
    for cost, counted in ((locked, locked.staggered(1.0)), (question.cost, question.cost)):
        found = answer(dataclasses.replace(question, cost=cost, busiest=1.0)).verdict
        assert found is not None
        seconds = migration.seconds_per_token(
            resident(question.layout),
            migration.halves(question.routes)[1],
            counted,
            question.tokens / question.tokens.mean(),
        )
        np.testing.assert_allclose(found.present_seconds, seconds * question.tokens.mean())


def test_a_full_device_cannot_receive(monkeypatch) -> None:
    """A migration that needs a slot there is refused, whoever asks for it, with a reason."""
    bench = Bench(monkeypatch)
    bench.rebalancer.want(0, protocol.RebalanceWanted(1, force=True, dry_run=True))
    bench.run()
    (question,) = bench.solver.asked
    assert answer(question).batches
    tight = spread(resident(question.layout), [1, 1], [16, 17])
    full = dataclasses.replace(question, layout=tight)
    for wanted in (None, resident(halves(LOW))):
        found = answer(dataclasses.replace(full, wanted=wanted))
        assert found.verdict is not None and not found.verdict.migrate and not found.batches
        reason = "device 0 of alpha has no empty slot to load an expert into"
        assert found.verdict.reason == reason


def test_batches_are_small() -> None:
    assert most_loads(BATCH_BYTES + 1) == 1
    assert most_loads(BATCH_BYTES // 3) == 3
    assert most_loads(1) == BATCH_EXPERTS


def test_what_is_measured_comes_first() -> None:
    measured = [MeasuredCosts(byte_s=8e-6), MeasuredCosts(call_s=1e-3)]
    cost = running_cost(SPEC, MODEL, CONFIG, measured, ServerLoad())
    given = parse_hosts(
        "alpha address=localhost experts=20 bandwidth=1Mbps\n"
        "beta address=localhost experts=20 bandwidth=1Mbps expert_time=1ms"
    )
    expected = cluster_cost(given, MODEL, CONFIG)
    for field in dataclasses.fields(cost):
        if field.name != "order":
            np.testing.assert_allclose(getattr(cost, field.name), getattr(expected, field.name))
    nothing = parse_hosts("a address=localhost experts=20\nb address=localhost experts=20")
    cost = running_cost(nothing, MODEL, CONFIG, [MeasuredCosts()] * 2, ServerLoad())
    assert isinstance(cost, CallCost)
    np.testing.assert_allclose(cost.state, 2 * 8 * 128 / DEFAULT_RATE)
    np.testing.assert_allclose(cost.round, (DEFAULT_ROUND_TRIP + CALL_S) / 2)
    assert cost.rows == CallCost.reference([1, 1], K).rows


def test_what_is_measured_of_round_trips_and_of_steps() -> None:
    """The mean of a server's calls contains the parts of the other servers."""
    spec = parse_hosts("\n".join(f"{n} address=localhost experts=20" for n in "abc"))
    part = np.array([1e-3, 5e-3, 2e-3])
    measured = [MeasuredCosts(round_s=each + (part.sum() - each) / 2) for each in part]
    load = ServerLoad(rows=((1.0, 90.0), (40.0, 10.0)), busy=0.3)
    cost = running_cost(spec, MODEL, CONFIG, measured, load)
    assert isinstance(cost, CallCost)
    np.testing.assert_allclose(cost.round, part)
    assert (cost.rows, cost.busy) == (load.rows, 0.3)
    # The order in which engines ask was set when they started; their links were equal then.
    assert cost.preferences().tolist() == [[1, 2, 0], [2, 0, 1], [0, 1, 2]]
    locked = dataclasses.replace(CONFIG, exchange="collectives")
    assert isinstance(running_cost(spec, MODEL, locked, measured, load), LockStepCost)


def test_old_work_fades() -> None:
    """Two half-lives after a workload changed, a quarter of the old one is left. Tokens per second
    are those of a steady flow, however often engines are asked."""
    work = Workload((1, LAYERS, EXPERTS), K, 2, 100.0, None, 0.0)
    tokens, seconds = 0, 0.0
    per_second = 50
    counts = np.zeros((LAYERS, EXPERTS), np.int64)
    for wait in (300.0, 10.0, 290.0, 900.0):
        tokens, seconds = tokens + int(per_second * wait), seconds + wait
        counts[:, 0] += int(per_second * wait)
        # A fifth of the tokens come in steps of 25; one device of two computes half of the time.
        sizes = [(0, 0)] * STEP_SIZES
        sizes[0], sizes[5] = (4 * tokens // 5, 4 * tokens // 5), (tokens // 125, tokens // 5)
        found = EngineStats(
            counts=counts.tolist(),
            transfers=[[0]] * LAYERS,
            bytes_sent=[0],
            tokens=tokens,
            steps=1,
            routes=routes(LOW, 3).tobytes(),
            top_k=K,
            pool_bytes=[0],
            step_rows=sizes,
            rows=4 * tokens,
            busiest_rows=tokens,
            expert_seconds=0.5 * seconds,
        )
        work.update({0: msgspec.msgpack.encode(found)}, seconds)
        np.testing.assert_allclose(work.token_rates(seconds), per_second, rtol=1e-6)
        load = work.load(seconds)
        np.testing.assert_allclose(load.busiest, 0.25)
        np.testing.assert_allclose(load.busy, 0.25, rtol=1e-6)
        (one, alone), (many, together) = load.rows
        assert one == 1.0 and many == pytest.approx(25)
        assert alone / together == pytest.approx(4 * 25)
    before = work.statistics(seconds).counts.sum()
    np.testing.assert_allclose(work.statistics(seconds + 200.0).counts.sum(), before / 4)


def test_engines_before_count_on() -> None:
    """A restarted engine's counters begin at 0, and its sample is small."""
    work = Workload((1, LAYERS, EXPERTS), K, 1, None, None, 0.0)
    assert work.load(0.0) == ServerLoad()
    work.update({0: msgspec.msgpack.encode(stats(AT_HOME[0]))}, 1.0)
    work.engines_died([0], 1.0)
    few = routes(HIGH, tokens=10)
    work.update({0: msgspec.msgpack.encode(stats(few))}, 2.0)
    # The step counts are those of both engines together.
    assert work.load(2.0).rows == ((2.0, 2.0),)
    found = work.statistics(2.0)
    assert found.counts.sum() == (len(AT_HOME[0]) + len(few)) * LAYERS * K
    assert len(found.routes[0]) == len(AT_HOME[0])
    np.testing.assert_array_equal(found.routes[0][: len(few)], few)
