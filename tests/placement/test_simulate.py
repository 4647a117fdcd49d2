"""The simulator against times by hand, queueing theory, metrics and the engine's own rules."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.config import UserError
from dance_jax.engine.scheduler import Scheduler
from dance_jax.engine.sequence import SamplingParams
from dance_jax.engine.sequence import Sequence as EngineSequence
from dance_jax.placement.simulate import (
    Model,
    Requests,
    Speed,
    simulate,
)
from dance_jax.placement.simulate.batches import Batches, Sequence
from dance_jax.placement.simulate.independent import Queues
from dance_jax.placement.simulate.lock_step import Clock, Layers
from dance_jax.placement.simulate.shares import Shares
from tests.placement.simulated import (
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
    speed = Speed(step=1.0, token=0.1, call=0.01, expert=0.5, request=3.0)
    buckets = {(2, 0): 7.0}
    slices = [(4 + 24) * 0.1] * 2 + [(4 + 8) * 0.1]
    calls = (50 + 4) * MODEL.layers * 2 * 0.01
    weights = 7 * MODEL.layers * 2 * 0.5
    first = 3 * 1.0 + sum(slices) + 50 * MODEL.layers * 2 * 0.01 + 3 * MODEL.layers * 2 * 0.5
    last = 7 * 1.0 + sum(slices) + 4 * 7.0 + calls + weights
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
    assert result.utilisation == pytest.approx(busy / (5.0 + last))
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
    there = 2 * (ROW / 1000 + 0.0625) + 2 * 0.01 + 0.125  # a row for each of two experts
    back = 2 * (REPLY / 1000 + 0.0625) + 2 * 0.01 + 0.125
    seconds = MODEL.layers * (there + 0.25 + back) + (4 + 8) * 0.3 + 0.5
    np.testing.assert_allclose(result.latencies, [seconds])
    assert result.bytes_nn.tolist() == [[0, 3 * 2 * ROW], [3 * 2 * REPLY, 0]]
    assert result.steps.tolist() == [1, 0]
    communicate = MODEL.layers * (there + back)
    np.testing.assert_allclose(result.communicate_seconds, [communicate, 0])
    np.testing.assert_allclose(result.compute_seconds, [seconds - communicate, 0])
    assert result.network == pytest.approx(communicate / seconds)


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
    """Half of the time, after a burst of 1 s that lasts for 2 s, and is saved anew in 2 s."""
    shares = Shares([Speed(share=0.5, burst=1.0), Speed()])

    def spend(seconds: float, at: float) -> list[float]:
        return shares.spend(np.full(2, seconds), np.full(2, at)).tolist()

    assert spend(2, 0) == [2, 2]
    assert spend(3, 2) == [6, 3]
    assert spend(2, 9) == [3, 2]  # 0.5 s are saved, and last for 1 s
    assert spend(2, 100) == [2, 2]


@given(
    st.floats(0.1, 1),
    st.floats(0, 5),
    st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=1, max_size=20),
)
def test_a_quota_is_kept(share: float, burst: float, turns: list[tuple[float, float]]) -> None:
    """In any time: never more than it and what was saved; who has saved enough is not stopped."""
    shares, at, moments = Shares([Speed(share=share, burst=burst)]), 0.0, []
    for rest, seconds in turns:
        at += rest
        (taken,) = shares.spend(np.array([seconds]), np.array([at]))
        assert taken >= seconds
        if seconds * (1 - share) > burst + 1e-9:
            assert taken > seconds
        if seconds * (1 - share) < min(burst, share * rest) - 1e-9:
            assert taken == seconds
        moments.append((at, at + taken, seconds))
        at += taken
    for first in range(len(moments)):
        for last in range(first, len(moments)):
            spent = sum(seconds for *_, seconds in moments[first : last + 1])
            assert spent <= burst + share * (moments[last][1] - moments[first][0]) + 1e-6


def test_a_server_with_a_quota_takes_longer() -> None:
    """A step of 3 x (0.5 + 0.5) s: 1 s is saved, and it gets a half."""
    speed = Speed(token=0.75, call=0.25, share=0.5, burst=1.0)
    result = simulate(scenario(speed=speed, requests=[(0.0, 0, 1, 1)]))
    free = simulate(scenario(speed=dataclasses.replace(speed, share=1.0)))
    spent = free.work[0].computing_s
    assert free.latency.mean == pytest.approx(spent) and spent > 2
    assert result.latency.mean == result.work[0].computing_s == pytest.approx(2 * (spent - 1))


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
    assert result.utilisation == pytest.approx(count * service / result.seconds)
    assert result.utilisation == pytest.approx(load, rel=0.03)


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


def test_what_is_on_its_way_holds_nobody_up() -> None:
    queue = Queues(1)
    assert queue.serve(0, now=0.0, there=10.0, seconds=2.0) == 12.0
    # There before it, and done before it is there, but for the work that has been promised.
    assert queue.serve(0, now=1.0, there=1.0, seconds=3.0) == 5.0
    assert queue.serve(0, now=2.0, there=2.0, seconds=1.0) == 6.0
    assert queue.serve(0, now=20.0, there=20.0, seconds=1.0) == 21.0
    assert queue.busy == [7.0]


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
        ({"cores": 1.0, "lock_step": False}, "shares of cores are simulated in lock step only"),
        ({"bandwidth": 0.0}, "bandwidth of server 0 is 0.0"),
        ({"delay": -1.0}, "delay of server 0 must be finite and at least 0; got -1.0"),
        ({"speed": Speed(call=math.inf)}, "call of server 0 must be finite"),
        ({"speed": Speed(buckets={(2, 0): -1.0})}, r"bucket \(2, 0\) of server 0 must be"),
        ({"speed": Speed(share=0.0)}, "share of server 0 is 0.0; above 0"),
        ({"speed": Speed(share=1.5)}, "share of server 0 is 1.5; above 0 and at most 1"),
        ({"speed": Speed(burst=-1.0)}, "burst of server 0 must be finite"),
        ({"speed": Speed(share=0.5), "lock_step": False}, "in lock step only"),
        ({"speed": Speed(share=0.5), "cores": 2.0}, "share cores, or each has its own share"),
        ({"devices": (0,)}, "server 0 has 0 devices"),
        ({"devices": ()}, "at least one server"),
        ({"resident": np.ones((2, 3, 8), bool)}, r"placement \(2, 3, 8\)"),
        ({"resident": np.zeros((1, 3, 8), bool)}, "24 experts are on no server"),
        ({"routes": ()}, "routes of 0 servers"),
        ({"routes": (np.zeros((4, 3, 1), int),)}, "routes of server 0 have shape"),
        ({"routes": (np.full((4, 3, 2), 8),)}, r"not expert numbers 0\.\.7"),
        ({"routes": (np.zeros((0, 3, 2), int),)}, "server 0 has requests, but no routes"),
        ({"requests": [(0.0, 1, 1, 1)]}, "a request for server 1, there are 1"),
        ({"requests": [(0.0, 0, 250, 7)]}, "1 of 1 requests are longer than max_model_len, 256"),
    ],
)
def test_scenarios_that_cannot_be(changes: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        scenario(**changes)
