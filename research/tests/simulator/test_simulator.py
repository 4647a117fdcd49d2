"""The simulator against times by hand, queueing theory, metrics and the engine's own rules."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.config import UserError
from dance_jax.engine.scheduler import Scheduler
from dance_jax.engine.sequence import SamplingParams
from dance_jax.engine.sequence import Sequence as EngineSequence
from dance_jax.placement.core import Placement
from research.simulator import (
    Model,
    Requests,
    Speed,
    simulate,
)
from research.simulator.batches import Batches, Sequence
from research.simulator.independent import Link
from research.simulator.lock_step import Clock, Layers
from research.simulator.shares import Shares
from research.tests.simulator.cases import (
    ALL,
    CONFIG,
    HEAD,
    MODEL,
    REPLY,
    REPLY_HEAD,
    ROW,
    held,
    scenario,
)

MODES = pytest.mark.parametrize("lock_step", [True, False])


# Batches.


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 90), st.integers(1, 12)),
        min_size=1,
        max_size=14,
    ),
    st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_steps_are_those_of_the_engine_s_scheduler(
    devices: int, requests: list[tuple[int, int, int]], others_decode: list[bool]
) -> None:
    ours = Batches(CONFIG, devices)
    theirs = Scheduler(CONFIG, devices, num_blocks=CONFIG.max_num_seqs * CONFIG.max_blocks)
    coming = sorted((at, number, *rest) for number, (at, *rest) in enumerate(requests))
    step = compared = 0
    while coming or ours.active:
        while coming and coming[0][0] <= step:
            _, number, prompt, output = coming.pop(0)
            ours.add(Sequence(number, prompt, output))
            # Every prompt is one of its own, so that none is cached.
            tokens = [1000 * number + i for i in range(prompt)]
            theirs.add(EngineSequence(str(number), 0, tokens, SamplingParams(), output, seed=0))
        others = others_decode[step % len(others_decode)]
        plan, engine_plan = ours.schedule(others), theirs.schedule(others)
        assert plan.bucket == engine_plan.bucket
        assert plan.decoding == engine_plan.decoding
        expected: dict[tuple[int, int], int] = {}
        for device, rows in enumerate(engine_plan.entries):
            for row in rows:
                key = (int(row.sequence.request_id), device)
                expected[key] = expected.get(key, 0) + len(row.tokens)
        assert {(s.request, s.device): count for s, count in plan.work} == expected
        if plan.work:
            assert list(plan.positions) == [
                sum(row.positions for row in rows) for rows in engine_plan.entries
            ]
        compared += bool(plan.work)
        theirs.commit(engine_plan)
        for row in (row for rows in engine_plan.entries for row in rows if row.sample):
            row.sequence.output_token_ids.append(7)
            if len(row.sequence.output_token_ids) == row.sequence.max_tokens:
                theirs.finish(row.sequence)
        ours.commit(plan)
        assert ours.active == theirs.active
        step += 1
    assert compared >= max(output for _, _, output in requests)


# Times by hand.


@MODES
def test_one_server_alone(lock_step: bool) -> None:
    # 50 tokens are 7 blocks: slices of 3, 3 and 1 blocks (the smaller bucket), then 4 decodes.
    speed = Speed(step=1.0, token=0.1, position=0.001, call=0.01, expert=0.5, request=3.0)
    buckets = {(2, 0): 7.0}
    prompt, decodes = sum(range(1, 51)) * 0.001, sum(range(51, 55)) * 0.001
    slices = [(4 + 24) * 0.1] * 2 + [(4 + 8) * 0.1]
    calls = (50 + 4) * MODEL.layers * 2 * 0.01
    weights = 7 * MODEL.layers * 2 * 0.5
    first = (
        3 * 1.0 + sum(slices) + prompt + 50 * MODEL.layers * 2 * 0.01 + 3 * MODEL.layers * 2 * 0.5
    )
    last = 7 * 1.0 + sum(slices) + prompt + 4 * 7.0 + decodes + calls + weights
    result = simulate(
        scenario(
            requests=[(5.0, 0, 50, 5)],
            speed=dataclasses.replace(speed, buckets=buckets),
            lock_step=lock_step,
        )
    )
    np.testing.assert_allclose(result.ttfts, [first + 3.0])
    np.testing.assert_allclose(result.latencies, [last + 3.0])
    assert result.steps.tolist() == [7] and not result.bytes_nn.any()
    busy = last - 7 * 1.0
    assert result.device_utilisation[0][0] == pytest.approx(busy / (5.0 + last))
    assert result.seconds == pytest.approx(5.0 + last)
    np.testing.assert_allclose(result.compute_seconds, [last])
    assert result.communicate_seconds.tolist() == [0.0] and result.network == 0.0


def test_servers_rest_after_a_step_without_work() -> None:
    """The engine does one step more than there is work, and a request may come during it."""
    speed = Speed(step=1.0)
    requests = [(0.0, 0, 1, 1), (1.25, 0, 1, 1), (9.0, 0, 1, 1)]
    result = simulate(scenario(requests=requests, speed=speed))
    # The second comes within the step from 1 to 2; the third while all rest.
    np.testing.assert_allclose(result.latencies, [1.0, 0.75 + 1.0, 1.0])
    # Two steps with nothing in them.
    assert result.steps.tolist() == [5]


def test_a_ring_goes_over_the_network() -> None:
    result = simulate(
        scenario((1, 1), requests=[(0.0, 0, 1, 1)], speed=Speed(step=1.0), delay=0.25)
    )
    # To the other server, then every layer's dispatch; no row, so no return.
    np.testing.assert_allclose(result.latencies, [0.5 + MODEL.layers * 0.5 + 1.0])


def test_a_layer_across_two_servers_in_lock_step() -> None:
    # Server 0 holds nothing that its request calls; both experts are at server 1, on two devices.
    resident = held(ALL[2:], ALL)
    bandwidth, delay = 8 * 1000.0, 0.01
    speed = Speed(token=0.3, call=0.25, round=0.125, row=0.0625)
    case = scenario((1, 2), resident, speed=speed, bandwidth=bandwidth, delay=delay)
    result = simulate(case)
    assert result.steps.tolist() == [1, 1]
    # One prompt of one token: a slice of one block beside 4 rows; the idle server's pads 2 rows.
    trunk = (4 + 8) * 0.3
    dispatch = (ROW + HEAD) / 1000 + 0.0625 + 2 * delay + 0.125
    experts = 0.25  # each device one call
    back = (REPLY + REPLY_HEAD) / 1000 + 0.0625 + 2 * delay + 0.125
    seconds = MODEL.layers * (dispatch + experts + back) + trunk + 2 * delay
    np.testing.assert_allclose(result.latencies, [seconds])
    compute = MODEL.layers * experts + trunk
    np.testing.assert_allclose(result.compute_seconds, [compute] * 2)
    np.testing.assert_allclose(result.communicate_seconds, [seconds - 2 * delay - compute] * 2)
    each = MODEL.layers * np.array([[0, ROW + HEAD], [HEAD + REPLY + REPLY_HEAD, 0]])
    assert result.bytes_nn.tolist() == each.tolist()
    use = MODEL.layers * ((ROW + HEAD) / 1000 + 0.0625)
    assert result.out_utilisation[0] == pytest.approx(use / result.seconds)
    assert result.in_utilisation[1] >= result.out_utilisation[0] * (1 - 1e-12)


def test_a_layer_across_two_servers_out_of_lock_step() -> None:
    resident = held(ALL[2:], ALL)
    speed = Speed(step=0.5, token=0.3, call=0.25, round=0.125, row=0.0625)
    case = scenario(
        (1, 2), resident, speed=speed, bandwidth=8000.0, delay=0.01,
        lock_step=False, messages="expert",
    )  # fmt: skip
    result = simulate(case)
    there = 2 * ROW / 1000 + 2 * 0.01 + 0.125  # a row for each of two experts
    back = 2 * REPLY / 1000 + 2 * 0.01 + 0.125
    packing = 2 * 0.0625
    layer = packing + there + packing + 0.25 + back
    seconds = MODEL.layers * layer + (4 + 8) * 0.3 + 0.5
    np.testing.assert_allclose(result.latencies, [seconds])
    assert result.bytes_nn.tolist() == [[0, 3 * 2 * ROW], [3 * 2 * REPLY, 0]]
    assert result.steps.tolist() == [1, 0]
    communicate = MODEL.layers * (there + back)
    np.testing.assert_allclose(result.communicate_seconds, [communicate, 0])
    np.testing.assert_allclose(result.compute_seconds, [seconds - communicate, 0])
    assert result.network == pytest.approx(communicate / seconds)


@pytest.mark.parametrize(("own", "delay"), [(0.25, 0.05), (0.25, 0.5), (2.0, 0.05)])
def test_what_is_here_is_computed_while_calls_are_out(own: float, delay: float) -> None:
    """One expert of each layer is here, the other elsewhere: the slower of both counts."""
    speed = Speed(token=0.3, call=own)
    case = scenario((1, 1), held(ALL[:1], ALL[1:]), speed=speed, delay=delay, lock_step=False)
    here, there = case.servers
    there = dataclasses.replace(there, speed=Speed(call=0.125))
    result = simulate(dataclasses.replace(case, servers=(here, there)))
    layer = max(own, 0.125 + 2 * 2 * delay)
    np.testing.assert_allclose(result.latencies, [MODEL.layers * layer + (4 + 8) * 0.3])


def test_calls_that_wait_for_the_same_layer_are_computed_in_one_go() -> None:
    """Three servers ask a fourth for the same experts, whose weights it reads once."""
    speed = Speed(call=0.01, expert=1.0, message=0.001)
    requests = [(0.001 * n, n, 1, 1) for n in range(3)]
    alone = MODEL.layers * (2 * (0.01 + 1.0) + 2 * 0.001)

    def latencies(**changes: Any) -> np.ndarray:
        case = scenario(
            (1,) * 4, held((), (), (), ALL), requests=requests, speed=speed, lock_step=False,
            **changes,
        )  # fmt: skip
        return simulate(case).latencies

    first, second, third = latencies()
    # The other two wait for the first layer of the first, are then computed in one go, as are the
    # second layer of the first, and so on in turn.
    turn, both = 2 * 1.01 + 0.001, 2 * 1.02 + 2 * 0.001
    assert first == pytest.approx(MODEL.layers * turn + (MODEL.layers - 1) * both + 0.001)
    assert second == pytest.approx(MODEL.layers * (turn + both), rel=1e-3)
    assert third == pytest.approx(second - 0.001)
    # Where each call is computed on its own, the last waits for three in each layer.
    assert latencies(messages="expert")[2] > 1.4 * third > 2 * alone
    # Each wants other experts: nothing is read once for two.
    other = [np.broadcast_to([2 * n, 2 * n + 1], (4, 3, 2)) for n in range(4)]
    assert latencies(routes=tuple(other))[2] > 1.3 * third


@pytest.mark.parametrize("beside", [True, False])
def test_calls_are_answered_beside_steps_or_between_their_parts(beside: bool) -> None:
    """Server 1 computes a trunk of 3 x 100 s; calls of server 0 take 1 s there."""
    case = scenario(
        (1, 1), held((), ALL), speed=Speed(token=25.0, call=0.5), lock_step=False,
        requests=[(0.0, 1, 1, 1), (0.0, 0, 1, 1)],
    )  # fmt: skip
    slow, fast = case.servers
    fast = dataclasses.replace(fast, beside=beside)
    slow = dataclasses.replace(slow, speed=Speed())
    latency = simulate(dataclasses.replace(case, servers=(slow, fast))).latencies[1]
    # In turn: the first call waits for a part of the trunk, the second for that layer's experts,
    # the third for the next part.
    assert latency == pytest.approx(3.0 if beside else (100 + 1) + (1 + 1) + (100 + 1))


def test_a_late_call_is_repeated_elsewhere() -> None:
    """Servers 1 and 2 hold all, and 1 stands still; who waits for it asks 2 after a while."""
    case = scenario((1, 1, 1), held((), ALL, ALL), lock_step=False, requests=[(0.0, 0, 1, 3)])
    own, still, other = case.servers
    still = dataclasses.replace(still, speed=Speed(expert=1e3))
    other = dataclasses.replace(other, speed=Speed(call=0.01))
    result = simulate(dataclasses.replace(case, servers=(own, still, other)))
    # One call; then the server that owes an answer is asked no more.
    assert [work.repeats for work in result.work] == [1, 0, 0]
    np.testing.assert_allclose(result.latencies, [0.2 + 3 * MODEL.layers * 2 * 0.01])
    assert result.bytes_nn[0].tolist() == [0, ROW, 3 * MODEL.layers * ROW]
    # Where nobody else has all of it, it is waited for.
    nobody = dataclasses.replace(case, placement=Placement(held((), ALL, ALL[:1])))
    result = simulate(dataclasses.replace(nobody, servers=(own, still, other)))
    assert result.latency.mean == pytest.approx(3 * MODEL.layers * 2 * 1e3)
    assert not any(work.repeats for work in result.work)


def test_a_call_is_late_by_what_is_known_of_its_server() -> None:
    """Answers that always take a second are waited for, once that is known."""
    speed = Speed(call=0.5)
    case = scenario(
        (1, 1, 1), held((), ALL, ALL), speed=speed, lock_step=False, requests=[(0.0, 0, 1, 20)]
    )
    repeats = simulate(case).work[0].repeats
    assert 1 <= repeats < 10


def test_long_slices_are_computed_in_two_groups_on_a_cpu() -> None:
    """While the calls of the first are out, the second's part of the trunk is computed."""
    case = scenario(
        (1, 1), held((), ALL), speed=Speed(token=0.1), delay=0.2, lock_step=False,
        requests=[(0.0, 0, 24, 1)],
    )  # fmt: skip
    trunk, way = (4 + 24) * 0.1, 4 * 0.2
    np.testing.assert_allclose(simulate(case).latencies, [trunk + MODEL.layers * way])
    halves = tuple(dataclasses.replace(server, beside=True) for server in case.servers)
    result = simulate(dataclasses.replace(case, servers=halves))
    # The first group's calls come back before its half of the next part is computed.
    np.testing.assert_allclose(result.latencies, [trunk + MODEL.layers * way])
    assert result.work[0].messages == 2 * MODEL.layers
    assert result.rows.tolist() == [24] * MODEL.layers


def test_many_rows_go_in_pieces() -> None:
    """So that one is on its way back while others are on their way there."""
    model = dataclasses.replace(MODEL, state_bytes=20_000)
    case = scenario(
        (1, 1), held((), ALL, model=model), model=model, bandwidth=8e6, lock_step=False,
        requests=[(0.0, 0, 24, 1)],
    )  # fmt: skip
    result = simulate(case)
    there, back = 24 * model.row_bytes / 1e6, 24 * model.state_bytes / 1e6
    assert result.work[0].messages == 4 * model.layers
    np.testing.assert_allclose(result.latencies, [model.layers * (there + back / 4)], rtol=0.01)


@pytest.mark.parametrize(
    ("own", "compute", "ways"), [(1.0, 5.0, 2), (5.125, 5.0, 2), (9.0, 9.0, 1)]
)
def test_the_critical_path_leads_through_what_comes_last(
    own: float, compute: float, ways: int
) -> None:
    """Server 0 asks 1 and 2, of which 1 is slow; then its own experts are the last."""
    delay = 0.125
    clock = Clock(scenario((1, 1, 1), delay=delay))
    rows_lnm = np.zeros((1, 3, 3), np.int64)
    rows_lnm[0, 0, 1:] = 1
    time = clock.time(Layers(rows_lnm, np.array([[own, 5.0, 1.0]]), np.array([0.5, 0.0, 0.0])), 0.0)
    # There and back, or only there: before server 0 has heard from all it computes nothing.
    assert time.compute == pytest.approx(compute + 0.5)
    assert time.seconds == pytest.approx(compute + 0.5 + ways * 2 * delay)


@pytest.mark.parametrize(("sender", "seconds"), [(0, 10.0 + 4.0), (1, 10.0 + 9.0)])
def test_rows_are_under_way_while_another_server_computes(sender: int, seconds: float) -> None:
    """Server 1 computes ten seconds of the first layer, the other nothing; the rows of the second
    take five seconds there, and the sums four back."""
    clock = Clock(scenario((1, 1), bandwidth=8 * ROW / 5 * 1000))
    clock.wires.reply = 0.8 * ROW
    rows_lnm = np.zeros((2, 2, 2), np.int64)
    rows_lnm[1, sender, 1 - sender] = 1000
    experts_ld = np.array([[0.0, 10.0], [0.0, 0.0]])
    time = clock.time(Layers(rows_lnm, experts_ld, np.zeros(2)), 0.0)
    assert time.seconds == pytest.approx(seconds, rel=0.01)
    assert time.compute == pytest.approx(10.0)


def test_shared_cores() -> None:
    work = np.array([[2.0, 2.0], [4.0, 0.0], [3.0, 1.0]])

    def seconds(cores: float | None) -> float:
        clock = Clock(scenario((1, 1), cores=cores))
        nothing = np.zeros((3, 2, 2), np.int64)
        return clock.time(Layers(nothing, work, np.zeros(2)), 0.0).seconds

    assert seconds(None) == seconds(2) == pytest.approx(2 + 4 + 3)
    assert seconds(1) == pytest.approx(4 + 4 + 4)
    assert seconds(0.5) == pytest.approx(8 + 8 + 8)


def test_a_quota_stops_who_computes_at_length() -> None:
    """Half a core, after a burst of 1 s that lasts for 2 s, and is saved anew in 2 s."""
    shares = Shares([Speed(quota=0.5, burst=1.0), Speed()])
    assert shares.limited == [True, False]

    def spend(now: float, seconds: float, threads: int = 1) -> float:
        return shares.spend(0, now, seconds, threads * seconds)

    assert spend(0, 2) == 2
    assert spend(2, 3) == 6
    assert spend(9, 2) == 3  # 0.5 s are saved, and last for 1 s
    assert spend(100, 2) == 2
    # Two threads use up in 2 / 3 s what one does in 2 s; then they have half a core together.
    assert spend(200, 2, threads=2) == pytest.approx(6)
    # And one that computes meanwhile is stopped until all has been made up for.
    assert spend(200, 1) == pytest.approx(8)


@given(
    st.floats(0.1, 2),
    st.floats(0, 5),
    st.lists(
        st.tuples(st.floats(0, 5), st.floats(0, 5), st.integers(1, 3)), min_size=1, max_size=20
    ),
)
def test_a_quota_is_kept(quota: float, burst: float, turns: list[tuple[float, float, int]]) -> None:
    """In any time: never more than it and what was saved, whether computations overlap or not;
    who has saved enough is not stopped."""
    shares, now, moments = Shares([Speed(quota=quota, burst=burst)]), 0.0, []
    for rest, seconds, threads in turns:
        now += rest
        taken = shares.spend(0, now, seconds, threads * seconds)
        assert taken >= seconds
        idle = now - max([end for _, end, _ in moments], default=0.0)
        if threads * seconds < min(burst, quota * idle) - 1e-9:
            assert taken == seconds
        moments.append((now, now + taken, threads * seconds))
    for first in range(len(moments)):
        for last in range(first, len(moments)):
            spent = sum(seconds for *_, seconds in moments[first : last + 1])
            assert spent <= burst + quota * (moments[last][1] - moments[first][0]) + 1e-6


@MODES
def test_a_server_with_a_quota_takes_longer(lock_step: bool) -> None:
    """Both devices compute the trunk: 2 s are saved, and they get one core."""
    speed = Speed(token=0.75, quota=1.0, burst=2.0)
    result = simulate(scenario((2,), speed=speed, lock_step=lock_step))
    free = simulate(scenario((2,), speed=Speed(token=0.75), lock_step=lock_step))
    spent = free.latency.mean
    assert spent == pytest.approx((4 + 8) * 0.75)
    assert result.latency.mean == pytest.approx(2 * spent - 2)


# Queues.


@MODES
def test_waiting_times_are_those_of_one_queue(lock_step: bool) -> None:
    """M/D/1 at 60 %: every latency by Lindley's recursion, and the mean by Pollaczek-Khinchin."""
    count, service, load = 8000, 0.75, 0.6
    rng = np.random.default_rng(3)
    at = np.cumsum(rng.exponential(service / load, count))
    one = np.ones(count, int)
    config = dataclasses.replace(CONFIG, max_num_seqs=1, decode_rows=(1,))
    # Only calls cost, so that a step without work is over at once.
    model = Model(layers=1, experts=2, top_k=1, state_bytes=100)
    case = scenario(
        model=model, requests=Requests(at, 0 * one, one, one), speed=Speed(call=service),
        config=config, lock_step=lock_step,
    )  # fmt: skip
    result = simulate(case)
    waits = np.zeros(count)
    for i in range(1, count):
        waits[i] = max(0.0, waits[i - 1] + service - (at[i] - at[i - 1]))
    np.testing.assert_allclose(result.latencies, waits + service, atol=1e-8)
    expected = service * load / (2 * (1 - load))
    assert waits.mean() == pytest.approx(expected, rel=0.08)
    assert result.device_utilisation[0][0] == pytest.approx(count * service / result.seconds)
    assert result.device_utilisation[0][0] == pytest.approx(load, rel=0.03)


def test_a_saturated_link_carries_what_it_can() -> None:
    """Three servers whose experts are all at a fourth: its link in is never idle."""
    servers, rate = 4, 1e6
    resident = held(*[()] * (servers - 1), ALL)
    requests = [(0.0, n, 40, 30) for n in range(servers - 1) for _ in range(4)]
    case = scenario(
        (1,) * servers, resident, requests=requests, bandwidth=8 * rate,
        lock_step=False, messages="expert",
    )  # fmt: skip
    result = simulate(case)
    tokens = len(requests) * (40 + 30 - 1)
    assert result.received_bytes[-1] == tokens * MODEL.layers * 2 * ROW
    assert result.sent_bytes[-1] == tokens * MODEL.layers * 2 * REPLY
    assert result.seconds >= result.received_bytes[-1] / rate
    assert result.seconds <= 1.05 * result.received_bytes[-1] / rate
    assert result.in_utilisation[-1] == pytest.approx(
        result.received_bytes[-1] / rate / result.seconds
    )


def test_connections_share_a_link_evenly() -> None:
    link = Link(burst=0.0)
    assert link.serve((0, 1), 0.0, 10.0) == 10.0
    # A short message takes twice as long as alone beside a long one of another connection.
    assert link.serve((2, 1), 2.0, 1.0) == 4.0
    # Of the long one six seconds are left then; on its own connection another waits for it.
    assert link.serve((0, 1), 5.0, 1.0) == 12.0
    assert link.serve((2, 1), 20.0, 1.0) == 21.0
    assert link.busy == 13.0


def test_messages_that_are_through_together_leave_a_link_with_nothing() -> None:
    """A moment before it has done them all, by numbers that are not exact."""
    link = Link(burst=0.0)
    for other in range(15):
        link.serve((0, other), 0.0, 0.1)
    assert link.serve((0, 0), 15 * 0.1, 1.0) == pytest.approx(2.5)


def test_a_link_that_rested_carries_a_burst_at_once() -> None:
    link = Link(burst=2.0)
    assert link.serve((0, 1), 0.0, 1.5) == 0.0
    assert link.serve((0, 1), 0.25, 1.0) == 0.5  # 0.75 s were left, or saved since
    assert link.serve((0, 1), 10.0, 3.0) == 11.0


@given(
    st.lists(
        st.tuples(st.floats(0, 3), st.integers(0, 3), st.floats(0.01, 2)), min_size=1, max_size=30
    )
)
def test_a_link_loses_no_work_and_no_time(turns: list[tuple[float, int, float]]) -> None:
    link, now, end = Link(burst=0.0), 0.0, 0.0
    for rest, other, seconds in turns:
        now += rest
        end = max(now, end) + seconds
        through = link.serve((0, other), now, seconds)
        assert now + seconds <= through + 1e-9 and through <= end + 1e-9
    # Nobody's message is longer than all that is left.
    assert link.serve((0, 4), now, 100.0) == pytest.approx(end + 100.0)


def test_in_lock_step_a_link_is_idle_while_the_other_way_is_in_use() -> None:
    rate = 1e6
    requests = [(0.0, 0, 8, 200)]
    case = scenario((1, 1), held((), ALL), requests=requests, bandwidth=8 * rate)
    result = simulate(case)
    # Rows go and sums come back in turn, as many each.
    sent, received = result.sent_bytes[0], result.received_bytes[0]
    heads = result.steps[0] * MODEL.layers * HEAD
    assert result.seconds == pytest.approx((sent + received - heads) / rate)
    assert result.out_utilisation[0] + result.in_utilisation[0] == pytest.approx(
        1 + heads / rate / result.seconds
    )


# Bad input.


def test_requests_that_are_none() -> None:
    for arrays, reason in [
        (([], [], [], []), "one number each"),
        (([0.0], [0], [1], [1, 2]), "one number each"),
        (([-1.0], [0], [1], [1]), "at least 0"),
        (([np.nan], [0], [1], [1]), "finite"),
        (([0.0], [-1], [1], [1]), "server must be whole numbers of at least 0"),
        (([0.0], [0], [0], [1]), "prompt must be whole numbers of at least 1"),
        (([0.0], [0], [1], [1.5]), "output must be whole numbers"),
    ]:
        with pytest.raises(UserError, match=reason):
            Requests(*map(np.array, arrays))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"messages": "token"}, "messages='token'"),
        ({"cores": 0}, "cores=0, not above 0"),
        ({"cores": 1.0, "lock_step": False}, "shared cores are simulated in lock step only"),
        ({"bandwidth": 0.0}, "bandwidth of server 0 is 0.0"),
        ({"delay": -1.0}, "delay of server 0 must be finite and at least 0; got -1.0"),
        ({"speed": Speed(call=math.inf)}, "call of server 0 must be finite"),
        ({"speed": Speed(buckets={(2, 0): -1.0})}, r"bucket \(2, 0\) of server 0 must be"),
        ({"speed": Speed(quota=0.0)}, "quota of server 0 is 0.0, not above 0"),
        ({"speed": Speed(burst=-1.0)}, "burst of server 0 must be finite"),
        ({"speed": Speed(quota=0.5), "cores": 2.0}, "share cores, or each has a quota"),
        ({"devices": (0,)}, "server 0 has 0 devices"),
        ({"devices": ()}, "at least one server"),
        ({"resident": np.ones((2, 3, 8), bool)}, r"placement \(2, 3, 8\)"),
        ({"resident": np.zeros((1, 3, 8), bool)}, "24 experts are on no server"),
        ({"routes": ()}, "routes of 0 servers"),
        ({"routes": (np.zeros((4, 3, 1), int),)}, "routes of server 0 have shape"),
        ({"routes": (np.full((4, 3, 2), 8),)}, r"not expert numbers 0\.\.7"),
        ({"routes": (np.zeros((0, 3, 2), int),)}, "server 0 has requests but no routes"),
        ({"requests": [(0.0, 1, 1, 1)]}, "a request for server 1, but there are 1 servers"),
        ({"requests": [(0.0, 0, 250, 7)]}, "1 of 1 requests are longer than max_model_len, 256"),
    ],
)
def test_scenarios_that_cannot_be(changes: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        scenario(**changes)
