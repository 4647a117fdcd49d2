"""Flows against the metrics, and predicted times against plain readings of their definitions."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.placement.core import Placement
from dance_jax.placement.cost import CallCost, LockStepCost
from dance_jax.placement.flows import BLOCK_TOKENS, MOST_TOKENS, Flows, Sample, flows, packed
from dance_jax.placement.measures import measure
from tests.placement.cases import preferring_routes, random_order, random_resident

quick = settings(max_examples=8, deadline=None, derandomize=True, database=None)
#: Layers, experts (of two words), k; blocks, layers and servers of times.
LAYERS, EXPERTS, K = 2, 40, 4
SIZES = (2, 3, 4)

flows = jax.jit(flows)


def case(seed, servers, blocks=1):
    """A placement of few holders and of many, routes, and an order."""
    rng = np.random.default_rng(seed)
    shape = (servers, LAYERS, EXPERTS)
    resident = random_resident(rng, shape, rng.choice([0.0, 0.1, 0.4]))
    routes = preferring_routes(seed, (*shape, K), blocks * BLOCK_TOKENS)
    return resident, routes, random_order(rng, servers)


def assert_same(found: Flows, want: list) -> None:
    """Blocks as those of `measure`."""
    away = np.mean([traffic.away_ln for traffic in want], axis=0)
    np.testing.assert_allclose(found.away.mean(0), away, atol=1e-6)
    for b, traffic in enumerate(want):
        np.testing.assert_allclose(found.sent[b], traffic.transfers_lnn, atol=1e-6)
        np.testing.assert_allclose(found.calls[b], traffic.calls_lnn, atol=1e-6)
    assert len(found.sent) == len(found.calls) == len(want)


@pytest.mark.parametrize("servers", [1, 2, 3, 33])
def test_flows_are_those_that_are_measured(servers):
    @quick
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed):
        resident, routes, order = case(seed, servers)
        sample = Sample.of(routes, EXPERTS, order, blocks=False)
        assert_same(flows(sample, jnp.asarray(resident)), [measure(resident, routes, order)])

    check()


def test_neighbours_are_dealt_to_different_blocks():
    resident, routes, order = case(0, 3, blocks=2)
    sample = Sample.of(routes, EXPERTS, order, blocks=True)
    want = [measure(resident, [route[b::2] for route in routes], order) for b in range(2)]
    assert_same(flows(sample, jnp.asarray(resident)), want)


def test_a_server_without_tokens_or_with_few_of_them():
    resident, routes, order = case(1, 3)
    routes = [routes[0], routes[1][:0], routes[2][: BLOCK_TOKENS // 4]]
    sample = Sample.of(routes, EXPERTS, order, blocks=False)
    found, want = flows(sample, jnp.asarray(resident)), measure(resident, routes, order)
    active = want.active_n
    np.testing.assert_allclose(found.away[0][:, active], want.away_ln[:, active], atol=1e-6)
    np.testing.assert_allclose(found.sent[0][:, active], want.transfers_lnn[:, active], atol=1e-6)
    for form in (CallCost, LockStepCost):
        cost = dataclasses.replace(form.reference([1, 1, 2], K), order=order)
        got = layer_time(cost.times(active.astype(float)), found)
        want = Placement(resident).layer_time(routes, cost)
        assert float(got) == pytest.approx(want, rel=1e-5)


def test_a_long_sample_is_thinned_out_evenly():
    routes = [np.arange(MOST_TOKENS)[:, None, None] % 2 for _ in range(2)]
    sample = Sample.of(routes, 2, np.array([[1, 0], [0, 1]]), blocks=True)
    assert sample.experts.size == MOST_TOKENS and not np.asarray(sample.experts).any()
    np.testing.assert_allclose(sample.used, np.array([[[1, 0]], [[1, 0]]]))


@quick
@given(st.sampled_from([1, 32, 33, 80]), st.integers(0, 2**32 - 1))
def test_packed_has_a_bit_for_each_expert(experts, seed):
    held = np.random.default_rng(seed).random((2, experts)) < 0.5
    words = np.asarray(packed(jnp.asarray(held)))
    assert words.shape == (2, -(-experts // 32))
    bits = words[:, :, None] >> np.arange(32, dtype=np.uint32) & 1
    assert (bits.reshape(2, -1)[:, :experts] == held).all()
    assert not bits.reshape(2, -1)[:, experts:].any()


def random_flows(rng, shape):
    """With servers that send nothing, and some that always do."""
    blocks, layers, servers = shape
    sent = rng.random((blocks, layers, servers, servers)) * rng.choice([0, 1], shape)[..., None]
    sent *= 1 - np.eye(servers)
    away = np.clip(sent.max(-1) + 0.1 * rng.random(shape) * (sent.sum(-1) > 0), 0, 1)
    calls = sent * rng.uniform(1, 3, sent.shape) + np.eye(servers) * rng.random(servers)
    return Flows(away, sent, calls)


def random_costs(rng, servers):
    parts = {
        "state": rng.uniform(0.5, 2, servers),
        "call": rng.uniform(0.1, 1, servers),
        "devices": rng.integers(1, 3, servers),
    }
    rows = tuple((float(rows), rng.random() + 0.1) for rows in (1, 3, 50))
    round_n = rng.uniform(0, 2, servers)
    return (
        CallCost(**parts, round=round_n, rows=rows, busy=rng.random()),
        LockStepCost(**parts, transfer=rng.random()),
    )


def plain_wait(cost, rows, sent_m, calls_m, n, away):
    """Expected seconds of the slowest of the servers that are visited, given that any is."""
    others = [m for m in range(cost.servers) if sent_m[m] > 0]
    visit = {m: 1 - (1 - min(sent_m[m], 1)) ** rows for m in others}
    out = rows * sent_m.sum() * cost.state[n] / (1 - (1 - away) ** rows)
    seconds = {
        m: cost.round[n]
        + cost.round[m]
        + max(out, rows * sent_m[m] * cost.state[m] / visit[m])
        + rows * calls_m[m] * cost.call[m] / cost.devices[m] / visit[m]
        for m in others
    }
    total = chance = 0.0
    for chosen in itertools.product([False, True], repeat=len(others)):
        visited = [m for m, each in zip(others, chosen, strict=True) if each]
        if visited:
            p = np.prod([v if c else 1 - v for v, c in zip(visit.values(), chosen, strict=True)])
            total, chance = total + p * max(seconds[m] for m in visited), chance + p
    return total / chance


def plain_call_time(cost, found, weights):
    """Mean seconds of a layer, `times.CallTimes` read plainly."""
    blocks, layers, servers = found.away.shape
    rows_of_steps = sum(rows * steps for rows, steps in cost.rows)
    active = sum(weight > 0 for weight in weights)
    total, load_calls, load_ways = 0.0, np.zeros(servers), np.zeros(servers)
    for b, layer, n in itertools.product(range(blocks), range(layers), range(servers)):
        sent_m, calls_m = found.sent[b, layer, n], found.calls[b, layer, n]
        away = found.away[b, layer, n]
        for rows, steps in cost.rows:
            own = rows * calls_m[n] * cost.call[n] / cost.devices[n]
            seconds = own
            if away > 0:
                any_miss = 1 - (1 - away) ** rows
                wait = plain_wait(cost, rows, sent_m, calls_m, n, away)
                seconds = own * (1 - any_miss) + any_miss * max(own, wait)
            total += weights[n] * steps * seconds / (rows_of_steps * active * blocks)
        # What is computed and moved for this server, everywhere.
        load_calls += weights[n] * calls_m * cost.call / cost.devices / blocks
        load_ways += weights[n] * sent_m * cost.state / 2 / blocks
        load_ways[n] += weights[n] * sent_m.sum() * cost.state[n] / 2 / blocks
    shared = sum((load**2).sum() / load.mean() for load in (load_calls, load_ways) if load.any())
    return (total + cost.busy * shared / active) / layers


def plain_lock_step_time(cost, found, weights):
    """Mean seconds of a layer, `times.LockStepTimes` read plainly."""
    blocks, layers, _ = found.away.shape
    total = 0.0
    for b, layer in itertools.product(range(blocks), range(layers)):
        sent = found.sent[b, layer] * np.array(weights)[:, None]
        calls = (found.calls[b, layer] * np.array(weights)[:, None]).sum(0)
        ways = np.maximum(sent.sum(1), sent.sum(0))
        total += (ways * cost.state).max() + (calls * cost.call / cost.devices).max()
        total += cost.transfer * sent.sum() / sum(weight > 0 for weight in weights)
    return total / blocks / layers


@jax.jit
def layer_time(times, found):
    seconds, load = times.layers(found)
    return seconds.mean() + times.shared(load.sum(0)) / found.away.shape[1]


@pytest.mark.parametrize("silent", [False, True])
@quick
@given(seed=st.integers(0, 2**32 - 1))
def test_times_follow_their_definitions(silent, seed):
    rng = np.random.default_rng(seed)
    found = random_flows(rng, SIZES)
    weights = rng.uniform(0.2, 2, SIZES[-1])
    weights[0] *= not silent
    plain = (plain_call_time, plain_lock_step_time)
    for cost, definition in zip(random_costs(rng, SIZES[-1]), plain, strict=True):
        got = layer_time(cost.times(weights), Flows(*map(jnp.float32, found)))
        assert float(got) == pytest.approx(definition(cost, found, weights), rel=2e-4)


#: Server 0 misses expert 2, server 1 nothing.
HELD = np.array([[[1, 1, 0]], [[1, 1, 1]]], bool)


def asking(share, tokens=64):
    """Server 0 asks for expert 2 in that share of its tokens, server 1 never."""
    first = np.arange(tokens)[:, None, None] < share * tokens
    return [np.where(first, 2, 0), np.ones((tokens, 1, 1), int)]


def call_cost(**changes):
    parts = {"state": [0, 0], "call": [0, 0], "devices": [1, 1], "round": [2.0, 1.0], "busy": 0.0}
    return CallCost(**parts | changes)


def test_a_row_alone_waits_when_it_misses():
    placement = Placement(HELD)
    alone = call_cost(rows=((1, 1.0),))
    # Of both servers' rows one in two is of server 0, and a quarter of those wait a round.
    assert placement.layer_time(asking(0.25), alone) == pytest.approx(0.25 * 3.0 / 2)
    # What is computed at home, by the mean row, is hidden while others are out, or hides them.
    for seconds, waits in (([0.5, 0.25], 3.0 + 0.25), ([40.0, 0.25], 0.75 * 40.0)):
        own = 0.75 * seconds[0]
        computing = call_cost(rows=((1, 1.0),), call=seconds)
        want = (0.75 * own + 0.25 * waits + 0.25) / 2
        assert placement.layer_time(asking(0.25), computing) == pytest.approx(want)


def test_many_rows_wait_once_and_bytes_count_for_each():
    placement, rows = Placement(HELD), 10_000
    many = call_cost(rows=((rows, 1.0),))
    assert placement.layer_time(asking(0.25), many) == pytest.approx(3.0 / rows / 2, rel=1e-6)
    slow = call_cost(rows=((rows, 1.0),), state=[4.0, 1.0])
    # A quarter of its rows through its own link, the slower one.
    want = (0.25 * 4.0 + 3.0 / rows) / 2
    assert placement.layer_time(asking(0.25), slow) == pytest.approx(want, rel=1e-6)


def test_a_miss_that_only_the_large_sample_shows_costs_a_round():
    """One token in a thousand misses an expert, but none of those whose visits are followed."""
    cost = call_cost(rows=((1, 1.0),), call=[0.5, 0.25])
    away, sent, calls = np.array([[[1e-3, 0]]]), np.zeros((1, 1, 2, 2)), np.eye(2)[None, None]
    got = layer_time(cost.times(np.ones(2)), Flows(*map(jnp.float32, (away, sent, calls))))
    assert float(got) == pytest.approx((0.999 * 0.5 + 0.001 * 3.0 + 0.25) / 2, rel=1e-5)


def test_steps_weigh_as_often_as_they_occur():
    placement, routes = Placement(HELD), asking(0.25)
    times = {
        rows: rows * placement.layer_time(routes, call_cost(rows=((rows, 1.0),))) for rows in (1, 8)
    }
    mixed = call_cost(rows=((1, 3.0), (8, 1.0)))
    want = (3 * times[1] + times[8]) / (3 * 1 + 8)
    assert placement.layer_time(routes, mixed) == pytest.approx(want)


def test_whole_layers_at_home_never_wait():
    placement = Placement(np.ones((2, 1, 3), bool))
    cost = call_cost(call=[0.5, 0.25], devices=[2, 1])
    assert placement.layer_time(asking(0.25), cost) == pytest.approx(0.25)


def test_servers_that_are_busier_are_waited_for():
    """In proportion to `busy`, and the more the less evenly calls are spread."""
    routes, cost = asking(1.0), {"round": [0.0, 0.0], "call": [1.0, 1.0], "rows": ((1, 1.0),)}

    def waits(held):
        times = [
            Placement(held).layer_time(routes, call_cost(**cost, busy=busy))
            for busy in (0.0, 0.5, 1.0)
        ]
        assert times[2] - times[0] == pytest.approx(2 * (times[1] - times[0]))
        return times[2] - times[0]

    # Both calls on server 1, or each at home: 2^2 / 1 against (1 + 1) / 1, over both servers.
    assert waits(HELD) == pytest.approx(4 / 2)
    assert waits(np.ones((2, 1, 3), bool)) == pytest.approx(2 / 2)


def test_a_cost_of_links_that_take_no_time_is_finite():
    cost = call_cost(round=[0.0, 0.0], busy=1.0)
    assert Placement(HELD).layer_time(asking(0.25), cost) == 0.0
