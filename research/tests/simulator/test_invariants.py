"""What holds whatever is simulated, against `placement.measures`."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.config import EngineConfig, UserError
from dance_jax.launch.planning.costs import cluster_cost
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.models import model_config
from dance_jax.placement.core import Placement
from dance_jax.placement.cost import CallCost, Cost, LockStepCost
from research.simulator import (
    Model,
    Requests,
    Result,
    Scenario,
    Server,
    Speed,
    cost_of,
    simulate,
)
from research.simulator.lock_step import Clock, Layers, Wires
from research.simulator.scenario import Messages
from research.tests.simulator.cases import (
    ALL,
    CONFIG,
    MODEL,
    ROW,
    held,
    scenario,
)
from tests.tiny_models import SERVED

MODES = pytest.mark.parametrize("lock_step", [True, False])


# What has to hold whatever is simulated.


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Small clusters of any kind, in which every route is taken equally often."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    devices = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    num, layers, experts, k = len(devices), 2, 6, 3
    resident = rng.random((num, layers, experts)) < draw(st.sampled_from([0.0, 0.4, 0.9]))
    homeless = ~resident.any(0)
    resident[rng.integers(num, size=(layers, experts))[homeless], *np.nonzero(homeless)] = True
    tokens = 5
    routes = tuple(
        np.argsort(rng.random((tokens, layers, experts)))[..., :k].astype(np.int16) for _ in devices
    )
    count = draw(st.integers(1, 12))
    prompt = rng.integers(1, 40, count)
    # All computed tokens of a request, prompt + output - 1, are whole rounds of the routes.
    output = 1 + (-prompt) % tokens + tokens * rng.integers(0, 3, count)
    requests = Requests(rng.exponential(0.5, count), rng.integers(num, size=count), prompt, output)
    names = ("step", "token", "call", "expert", "round", "row", "message", "request", "burst")
    speeds = [
        Speed(
            **dict(zip(names, rng.exponential(1e-3, len(names)).tolist(), strict=True)),
            quota=quota,
        )
        for quota in draw(st.sampled_from([(math.inf,) * 4, (0.5, math.inf, 1.0, 0.1)]))[
            : len(devices)
        ]
    ]
    lock_step = draw(st.booleans())
    limited = any(speed.quota < math.inf for speed in speeds)
    return Scenario(
        servers=tuple(
            Server(d, layers * experts, speed, rng.exponential(1e6), rng.exponential(1e-3), beside)
            for d, speed, beside in zip(devices, speeds, rng.random(num) < 0.5, strict=True)
        ),
        model=Model(
            layers, experts, k, state_bytes=64, sum_bytes=draw(st.sampled_from([None, 100]))
        ),
        config=CONFIG,
        placement=Placement(resident),
        routes=routes,
        requests=requests,
        lock_step=lock_step,
        messages=draw(st.sampled_from(["server", "expert"])),
        cores=draw(st.sampled_from([None, 1.5])) if lock_step and not limited else None,
        seed=draw(st.integers(0, 9)),
    )


def rounds_of(case: Scenario) -> np.ndarray:
    """How often every token of a server's routes is computed: int64 [servers]."""
    requests = case.requests
    computed = requests.prompt + requests.output - 1
    tokens_n = np.bincount(requests.server, weights=computed, minlength=len(case.servers))
    lengths = np.array([len(route) for route in case.routes])
    assert not (tokens_n % lengths).any()
    return (tokens_n // lengths).astype(np.int64)


@settings(max_examples=15, deadline=None)
@given(scenarios())
def test_invariants(case: Scenario) -> None:
    result = simulate(case)
    # Every request is served, and none before it came.
    assert (result.ttfts > 0).all() and (result.latencies >= result.ttfts).all()
    assert np.array_equal(result.ttfts == result.latencies, case.requests.output == 1)
    # What crosses the links is what `placement.measures` says of the routes.
    traffic = case.placement.traffic(case.routes, case.order)
    flows = traffic.transfers_lnn
    if case.messages == "expert":
        own = np.arange(len(case.servers))
        flows = traffic.calls_lnn.copy()
        flows[:, own, own] = 0
    rounds_n = rounds_of(case) * len(case.routes[0])
    rows_lnn = np.rint(flows * rounds_n[:, None])
    repeats = sum(work.repeats for work in result.work)
    assert (result.rows >= rows_lnn.sum((1, 2))).all()
    assert repeats or np.array_equal(result.rows, rows_lnn.sum((1, 2)))
    least = rows_lnn.sum() * (case.model.row_bytes + case.model.reply_bytes)
    assert result.bytes_nn.sum() >= least * (1 - 1e-12)
    if case.messages == "server":
        rows_nn = rows_lnn.sum(0)
        payload = rows_nn * case.model.row_bytes + rows_nn.T * case.model.reply_bytes
        heads_nn = result.bytes_nn - payload
        if repeats or case.lock_step:
            assert heads_nn.any() == (repeats > 0 or len(case.servers) > 1)
        else:  # calls go to another holder while the first one owes a late answer
            assert heads_nn.sum() == pytest.approx(0, abs=1e-6)
        assert (heads_nn >= 0).all() or not case.lock_step
    assert not result.bytes_nn.diagonal().any()
    assert np.array_equal(result.sent_bytes, result.bytes_nn.sum(1))
    # Nothing is busy longer than time lasts, and steps wait for links.
    for each in (*result.device_utilisation, result.out_utilisation, result.in_utilisation):
        assert (each >= 0).all() and (each <= 1 + 1e-9).all()
    # Steps of a server come one after the other, and are computation and communication.
    paths_n = result.compute_seconds + result.communicate_seconds
    assert (result.compute_seconds >= 0).all() and (result.communicate_seconds >= -1e-9).all()
    assert (paths_n <= result.seconds * (1 + 1e-12)).all() and 0 <= result.network <= 1
    assert np.array_equal(paths_n > 0, result.steps > 0)
    if case.lock_step:
        assert len(set(result.steps)) == 1 and len(set(paths_n)) == 1
    else:
        check_work(case, result)


def check_work(case: Scenario, result: Result) -> None:
    """Every call is some server's work, and nobody works longer than steps last."""
    requests, model = case.requests, case.model
    tokens = (requests.prompt + requests.output - 1).sum()
    assert sum(work.calls for work in result.work) == tokens * model.layers * model.top_k
    assert sum(work.messages for work in result.work) % 2 == 0
    for n, work in enumerate(result.work):
        assert work.steps == result.steps[n] == work.buckets.total()
        steps_s = result.compute_seconds[n] + result.communicate_seconds[n]
        assert 0 <= work.computing_s <= steps_s * (1 + 1e-9)
        speed = case.servers[n].speed
        trunk_s = sum(speed.trunk(b, 0, CONFIG.block_size) * c for b, c in work.buckets.items())
        trunk_s += speed.position * work.positions / case.devices[n]
        assert work.computing_s >= (trunk_s + speed.step * work.steps) * (1 - 1e-9)
        # Nobody has more processors than its quota, or than devices and the thread beside them.
        most = min(speed.quota, case.devices[n] + case.servers[n].beside)
        assert work.processor_s <= speed.burst + most * result.seconds * (1 + 1e-9)


def equal(one: Result, other: Result) -> bool:
    pairs = [
        (getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(Result)
        if field.name not in ("device_utilisation", "work")
    ]
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


@MODES
def test_equal_scenarios_give_equal_results_and_seeds_differ(lock_step: bool) -> None:
    rng = np.random.default_rng(0)
    routes = tuple(
        np.argsort(rng.random((50, MODEL.layers, MODEL.experts)))[..., :2] for _ in range(2)
    )
    case = scenario(
        (1, 1), held(ALL[:4], ALL[4:]), routes, [(0.0, 0, 9, 9), (0.1, 1, 9, 9)],
        Speed(token=0.01), 1e5, lock_step=lock_step, messages="expert",
    )  # fmt: skip
    first = simulate(case)
    assert equal(first, simulate(dataclasses.replace(case)))
    assert not equal(first, simulate(dataclasses.replace(case, seed=1)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_a_step_waits_for_its_slowest_server_and_link(seed: int, num: int) -> None:
    rng = np.random.default_rng(seed)
    layers = 4
    rows = rng.integers(0, 4, (layers, num, num))
    rows[:, np.arange(num), np.arange(num)] = 0
    model = dataclasses.replace(MODEL, layers=layers)
    servers = tuple(Server(1, layers * 8, Speed(), rng.uniform(1e4, 1e6)) for _ in range(num))
    case = dataclasses.replace(scenario((1,) * num, model=model), servers=servers)
    clock, wires = Clock(case), Wires(case)
    work = Layers(rows, rng.exponential(1e-3, (layers, num)), rng.exponential(1e-3, num))
    time = clock.time(work, 0.0)
    alone = (work.experts_ld + work.trunk_n).sum(0)
    assert time.seconds >= alone.max() * (1 - 1e-12)
    assert time.seconds >= time.compute > 0
    # Where links cost nothing, a step waits for computation alone.
    fast = tuple(dataclasses.replace(server, bandwidth=math.inf) for server in servers)
    free = Clock(dataclasses.replace(case, servers=fast)).time(work, 0.0)
    assert time.seconds >= free.seconds == pytest.approx(free.compute, rel=1e-12)
    assert free.seconds >= alone.max() * (1 - 1e-12)
    for use in (time.out_n, time.in_n):
        assert time.seconds >= use.max() * (1 - 1e-12)
    slower = work.experts_ld.copy()
    slower[:, rng.integers(num)] *= 2
    assert (
        Clock(case).time(dataclasses.replace(work, experts_ld=slower), 0.0).seconds >= time.seconds
    )
    # At most what `Traffic.layer_time` says: the busiest way, and the busiest device, in turn.
    head = (num - 1) * (wires.head + wires.reply_head)
    ways = np.maximum(rows.sum(2), rows.sum(1)) * (model.row_bytes + model.reply_bytes) + head
    layer_time = (ways * wires.second_per_byte).max(1) + work.experts_ld.max(1)
    assert time.seconds <= (layer_time.sum() + layers * work.trunk_n.max()) * (1 + 1e-12)


def test_calls_with_a_message_each_go_to_any_holder() -> None:
    rng = np.random.default_rng(0)
    routes = (np.argsort(rng.random((400, MODEL.layers, MODEL.experts)))[..., :2],) * 3
    case = scenario(
        (1, 1, 1), held((), ALL, ALL), routes, [(0.0, 0, 200, 51)], bandwidth=1e6,
        messages="expert",
    )  # fmt: skip
    result = simulate(case)
    assert result.rows.tolist() == [2 * 250] * MODEL.layers
    one, other = result.bytes_nn[0, 1:]
    assert one == pytest.approx(other, rel=0.15)
    # A server that is visited takes both calls, and the lowest one is.
    visited = simulate(dataclasses.replace(case, messages="server"))
    assert visited.rows.tolist() == [250] * MODEL.layers
    assert not (visited.bytes_nn[0, 2] - MODEL.layers * visited.steps[0] * (16 + 4 * 4))


def equal_costs(one: Cost, other: Cost) -> None:
    assert type(one) is type(other)
    assert one.order is None and other.order is None
    for field in dataclasses.fields(one):
        if field.name != "order":
            np.testing.assert_allclose(getattr(one, field.name), getattr(other, field.name))


def test_policies_are_told_what_the_launcher_tells_them() -> None:
    """Of servers whose rates and times are in the hosts file."""
    model = model_config(SERVED)
    spec = parse_hosts(
        "a address=localhost experts=9 bandwidth=800kbps expert_time=2ms\n"
        "b address=localhost experts=9 devices=2 bandwidth=400kbps expert_time=1ms"
    )
    sizes = Model(len(model.moe_layers), model.num_experts, model.top_k, 4 * model.hidden_size)
    servers = [Server(1, 9, Speed(call=2e-3), 8e5), Server(2, 9, Speed(call=1e-3), 4e5)]
    for exchange in ("collectives", "calls"):
        config = EngineConfig(max_model_len=64, exchange=exchange)
        told = cluster_cost(spec, model, config)
        if isinstance(told, CallCost):
            # Of rounds nothing is said: the launcher takes what is usual.
            told = dataclasses.replace(told, round=np.zeros(2))
        equal_costs(cost_of(servers, sizes, exchange == "collectives"), told)


def test_costs_of_links_without_limit() -> None:
    servers = scenario((1, 2)).servers
    equal_costs(cost_of(servers, MODEL, True), LockStepCost.reference([1, 2], MODEL.top_k))
    equal_costs(cost_of(servers, MODEL, False), CallCost.reference([1, 2], MODEL.top_k))
    slower = dataclasses.replace(servers[0], bandwidth=800.0)
    with pytest.raises(UserError, match="cannot weigh links without limit against others"):
        cost_of([slower, servers[1]], MODEL, False)


@pytest.mark.parametrize("messages", ["server", "expert"])
def test_many_servers(messages: Messages) -> None:
    num = 40
    resident = np.zeros((num, MODEL.layers, MODEL.experts), bool)
    resident[np.arange(MODEL.experts) + num - MODEL.experts, :, np.arange(MODEL.experts)] = True
    requests = [(0.0, 0, 10, 2)]
    make = dict(devices=(1,) * num, resident=resident, requests=requests)
    result = simulate(scenario(**make, lock_step=False, messages=messages))  # type: ignore[arg-type]
    assert result.rows.tolist() == [11 * 2] * MODEL.layers
    assert result.sent_bytes[:1].tolist() == [11 * 2 * MODEL.layers * ROW]


def test_too_many_servers() -> None:
    with pytest.raises(UserError, match="scenario: 257 servers; at most 256"):
        scenario((1,) * 257)
