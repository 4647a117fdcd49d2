"""Placement, its metrics against a plain reading of their definitions, and its file."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.config import UserError
from dance_jax.placement.core import Placement
from dance_jax.placement.cost import CallCost, LockStepCost, of_pairs, staggered_share
from tests.placement.cases import plain_servers, random_order, random_resident

SHAPE, TOKENS, K = (3, 2, 6), 8, 3
LAYERS, EXPERTS = SHAPE[1:]


@st.composite
def placements(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Placement(random_resident(rng, SHAPE, draw(st.sampled_from([0.0, 0.3, 0.7]))))


def random_routes(seed, lengths=(TOKENS, TOKENS - 3, 1)):
    rng = np.random.default_rng(seed)
    return [
        np.argsort(rng.random((length, LAYERS, EXPERTS)), axis=2)[:, :, :K] for length in lengths
    ]


def plain_metrics(resident, routes, devices, order):
    """Flows by one loop per token: (remote, any_miss, transfers, busiest, load, device)."""
    num_servers = len(resident)
    flow = np.zeros((LAYERS, num_servers, num_servers))
    calls = np.zeros((LAYERS, num_servers))
    remote, away, visits = np.zeros((3, num_servers))
    for n, route in enumerate(routes):
        for token in route:
            for layer in range(LAYERS):
                held = resident[:, layer, token[layer]].T
                served = plain_servers(held, ~held[:, n], order[n])
                chosen = set(served) - {-1}
                remote[n] += (~held[:, n]).sum() / (len(route) * LAYERS * K)
                away[n] += (not held[:, n].all()) / (len(route) * LAYERS)
                visits[n] += len(chosen) / (len(route) * LAYERS)
                for m in chosen:
                    flow[layer, n, m] += 1 / len(route)
                for at in served:
                    calls[layer, n if at < 0 else at] += 1 / (len(route) * K * num_servers)
    ways = np.concatenate([flow.sum(2), flow.sum(1)], axis=1)
    shares = calls / np.array(devices)
    of_flows = (remote.mean(), away.mean(), visits.mean(), ways.max(1).mean())
    return *of_flows, shares.max(1).mean(), shares.mean(0).max()


def plain_layer_time(resident, routes, cost, weights):
    """Seconds of each layer by what every server sends, receives and computes, one at a time."""
    num_servers = len(resident)
    flows = Placement(resident).traffic(routes, cost.order)
    seconds = []
    for layer in range(LAYERS):
        sent = flows.transfers_lnn[layer] * np.array(weights)[:, None]
        calls = flows.calls_lnn[layer] * np.array(weights)[:, None]
        link = max(cost.state[n] * max(sent[n].sum(), sent[:, n].sum()) for n in range(num_servers))
        device = max(cost.call[n] * calls[:, n].sum() / cost.devices[n] for n in range(num_servers))
        seconds.append(link + device + cost.transfer * sent.sum() / num_servers)
    return np.mean(seconds)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(placements(), st.integers(0, 2**32 - 1))
def test_metrics_follow_their_definitions(placement, seed):
    routes, devices = random_routes(seed), [1, 1, 2]
    ring = np.array([[1, 2, 0], [2, 0, 1], [0, 1, 2]])
    for order in (None, random_order(np.random.default_rng(seed), 3)):
        traffic = placement.traffic(routes, order)
        got = (traffic.remote, traffic.any_miss, traffic.transfers, traffic.busiest)
        got = (*got, traffic.load(devices), traffic.device(devices))
        known = ring if order is None else order
        want = plain_metrics(placement.resident, routes, devices, known)
        assert got == pytest.approx(want, abs=1e-12)


def test_equal_holders_share_their_callers():
    """Tokens of each of four servers miss the same experts, which two others hold."""
    resident = np.zeros((4, 1, 4), bool)
    resident[[0, 1], 0, 0] = resident[[2, 3], 0, 1] = resident[:, 0, 2:] = True
    placement = Placement(resident)
    routes = [np.full((2, 1, 1), expert) for expert in (1, 1, 0, 0)]
    ring = placement.traffic(routes).calls_lnn[0]
    # The next of them after the caller: both callers of 0 and 1 go to 2, those of 2 and 3 to 0.
    assert ring.argmax(1).tolist() == [2, 2, 0, 0]
    order = np.array([[3, 2, 1, 0], [2, 3, 0, 1], [1, 0, 3, 2], [0, 1, 2, 3]])
    assert placement.traffic(routes, order).calls_lnn[0].argmax(1).tolist() == [3, 2, 1, 0]
    # Who answers sooner is called: by a cost's own rule, or by the order that it is given.
    cost = LockStepCost(state=np.array([2, 1, 2, 1]), call=np.zeros(4), devices=np.ones(4, int))
    by_cost = placement.traffic(routes, cost.preferences()).calls_lnn[0].argmax(1)
    assert by_cost.tolist() == [2, 3, 0, 1]
    told = dataclasses.replace(cost, order=order)
    assert np.array_equal(told.preferences(), order)
    far = CallCost(
        state=np.zeros(4), call=np.zeros(4), devices=np.ones(4, int), round=np.array([2, 1, 2, 1])
    )
    assert placement.traffic(routes, far.preferences()).calls_lnn[0].argmax(1).tolist() == [
        3, 3, 1, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("servers", [32, 40, 256])
def test_flows_between_many_servers(servers):
    """Each expert has one holder, so a token visits the holders of what it misses."""
    rng = np.random.default_rng(servers)
    home_le = rng.integers(0, servers, SHAPE[1:])
    routes = random_routes(servers, rng.integers(3, 5, servers))
    traffic = Placement(np.arange(servers)[:, None, None] == home_le).traffic(routes)
    calls = np.zeros((LAYERS, servers, servers))
    transfers = np.zeros_like(calls)
    for n, route in enumerate(routes):
        for token, layer in itertools.product(route, range(LAYERS)):
            at = home_le[layer, token[layer]]
            np.add.at(calls, (layer, n, at), 1 / len(route))
            transfers[layer, n, list({*at.tolist()} - {n})] += 1 / len(route)
    np.testing.assert_allclose(traffic.calls_lnn, calls)
    np.testing.assert_allclose(traffic.transfers_lnn, transfers)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(placements(), st.integers(0, 2**32 - 1))
def test_layer_time_follows_its_definition(placement, seed):
    rng, routes = np.random.default_rng(seed), random_routes(seed)
    cost = LockStepCost(
        state=rng.random(3),
        call=rng.random(3),
        devices=rng.integers(1, 4, 3),
        transfer=rng.random(),
        order=random_order(rng, 3),
    )
    weights = rng.random(3)
    want = plain_layer_time(placement.resident, routes, cost, weights)
    assert placement.layer_time(routes, cost, weights) == pytest.approx(want)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(placements(), st.integers(0, 2**32 - 1))
def test_servers_with_tokens_one_at_a_time(placement, seed):
    """All transfers then pass a busiest link: a layer of each server's token alone, added up."""
    routes = random_routes(seed)
    cost = LockStepCost(
        state=np.full(3, 2.0), call=np.zeros(3), devices=np.ones(3, int), transfer=0.7
    )
    alone = [
        placement.layer_time([r if m == n else r[:0] for m, r in enumerate(routes)], cost)
        for n in range(3)
    ]
    per_transfer = cost.transfer * placement.traffic(routes).transfers
    want = sum(alone) - 3 * per_transfer + per_transfer
    assert placement.layer_time(routes, cost.staggered(1.0)) == pytest.approx(want)
    half = (placement.layer_time(routes, cost) + want) / 2
    assert placement.layer_time(routes, cost.staggered(0.5)) == pytest.approx(half)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(placements(), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_how_often_that_was_is_found_again(placement, seed, share):
    """From what passed the busiest links while servers had tokens at once, and one at a time."""
    traffic = placement.traffic(random_routes(seed))
    together = traffic.concentration()
    if not traffic.transfers:
        assert together == 1.0 and staggered_share(1.0, together) == 0.0
        return
    assert together == pytest.approx(traffic.busiest / traffic.transfers / 3)
    observed = (1 - share) * together + share
    assert staggered_share(observed, together) == pytest.approx(share if together < 1 else 0.0)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(placements(), st.integers(0, 2**32 - 1))
def test_layer_time_of_the_reference_is_the_weighted_sum(placement, seed):
    routes, devices = random_routes(seed), [1, 1, 2]
    traffic = placement.traffic(routes)
    want = traffic.busiest + traffic.load(devices) + 0.3 * traffic.transfers
    assert placement.layer_time(routes, LockStepCost.reference(devices, K)) == pytest.approx(want)


@pytest.mark.parametrize("form", [CallCost, LockStepCost])
def test_links_of_one_speed_change_the_unit_alone(form):
    placement = Placement(random_resident(np.random.default_rng(0), SHAPE))
    routes, devices = random_routes(0), [1, 1, 2]
    want = placement.layer_time(routes, form.reference(devices, K))
    slow = form.of_links([2e-6] * 3, devices, K)
    assert placement.layer_time(routes, slow) == pytest.approx(2e-6 * want)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(placements(), st.integers(0, 2**32 - 1), st.permutations(range(3)))
def test_metrics_do_not_depend_on_names(placement, seed, order):
    """Renumbering experts changes nothing; renumbering servers keeps what ties cannot change."""
    routes = random_routes(seed)
    rng = np.random.default_rng(seed)
    names = rng.permutation(EXPERTS)
    renamed = Placement(placement.resident[:, :, np.argsort(names)])
    new_routes = [names[route] for route in routes]
    want, got = placement.traffic(routes), renamed.traffic(new_routes)
    for metric in ("remote", "any_miss", "transfers", "busiest"):
        assert getattr(got, metric) == pytest.approx(getattr(want, metric))
    assert (got.load(), got.device()) == pytest.approx((want.load(), want.device()))
    moved = Placement(placement.resident[list(order)])
    got = moved.traffic([routes[n] for n in order])
    for metric in ("remote", "any_miss", "transfers"):
        assert getattr(got, metric) == pytest.approx(getattr(want, metric))


def test_everything_everywhere_moves_nothing():
    placement = Placement(np.ones(SHAPE, bool))
    traffic = placement.traffic(random_routes(0))
    assert (traffic.remote, traffic.any_miss, traffic.transfers, traffic.busiest) == (0, 0, 0, 0)
    assert traffic.load([1, 1, 2]) == traffic.device([1, 1, 2]) == pytest.approx(1 / 3)


def test_a_server_without_tokens_is_left_out():
    placement = Placement(np.arange(3)[:, None, None] == np.zeros(SHAPE[1:], int))
    traffic = placement.traffic(random_routes(0, lengths=(4, 4, 0)))
    assert traffic.remote == traffic.any_miss == traffic.transfers == pytest.approx(0.5)
    assert traffic.busiest == pytest.approx(1)
    assert traffic.load() == traffic.device() == pytest.approx(1)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(placements(), st.integers(0, 2**32 - 1))
def test_local_share_is_what_remote_measures(placement, seed):
    routes = random_routes(seed, lengths=(5, 5, 5))
    counts = np.zeros(SHAPE, np.int64)
    for n, route in enumerate(routes):
        for layer in range(LAYERS):
            np.add.at(counts[n, layer], route[:, layer].ravel(), 1)
    assert placement.local_share(counts) == pytest.approx(1 - placement.traffic(routes).remote)
    assert placement.local_shares(counts).mean() == pytest.approx(placement.local_share(counts))


def test_local_share_without_counts_is_the_share_of_experts_held():
    placement = Placement(np.arange(3)[:, None, None] == np.zeros(SHAPE[1:], int))
    assert placement.local_shares(np.zeros(SHAPE)).tolist() == [1, 0, 0]
    assert placement.local_share(np.zeros(SHAPE)) == pytest.approx(1 / 3)


def test_validate():
    resident = np.zeros(SHAPE, bool)
    resident[0] = True
    Placement(resident).validate([12, 0, 0])
    with pytest.raises(UserError, match="server 0 holds 12 experts in 11 slots"):
        Placement(resident).validate([11, 9, 9])
    with pytest.raises(UserError, match="server alpha holds 12 experts"):
        Placement(resident).validate([11, 9, 9], ["alpha", "beta", "gamma"])
    with pytest.raises(UserError, match="expert 2 of MoE layer 1 is listed twice"):
        Placement.of_lists([[[0, 1, 2, 3], [2, 0, 1, 2]]], 4)
    with pytest.raises(UserError, match="3 servers, 2 capacities"):
        Placement(resident).validate([11, 9])
    resident[0, 1, 4] = False
    with pytest.raises(UserError, match=r"1 experts .* expert 4 of MoE layer 1"):
        Placement(resident).validate()


@pytest.mark.parametrize("bound", [None, 0.75])
def test_file_round_trip_and_torn_file(tmp_path, bound):
    placement = Placement(np.random.default_rng(0).random(SHAPE) < 0.5, bound)
    path = tmp_path / "placement.npz"
    placement.save(path)
    loaded = Placement.from_file(path)
    assert loaded == placement and loaded.upper_bound == bound
    assert [file.name for file in tmp_path.iterdir()] == ["placement.npz"]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"placement\.npz"):
        Placement.from_file(path)
    with pytest.raises(UserError, match="missing"):
        Placement.from_file(tmp_path / "missing.npz")


def test_moved_counts_what_must_be_loaded():
    before, after = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    before[0] = after[0] = True
    before[1, 0, 0] = after[2, 0, :3] = True
    assert Placement(after).moved(Placement(before)) == 3
    assert Placement(before).moved(Placement(after)) == 1
    assert Placement(after).moved(Placement(after)) == 0
    with pytest.raises(UserError, match=r"\(2, 2, 6\)|shape"):
        Placement(after).moved(Placement(after[:2]))


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        (LockStepCost, {"call": [1]}, "one number per server"),
        (LockStepCost, {"state": [1.0, np.nan]}, "state must be finite"),
        (CallCost, {"call": [1, -1]}, "call must be .* at least 0"),
        (LockStepCost, {"devices": [1, 0]}, "whole number of devices"),
        (CallCost, {"devices": [1.0, 1.0]}, "whole number of devices"),
        (LockStepCost, {"transfer": -1.0}, "transfer must be"),
        (LockStepCost, {"transfer": np.inf}, "transfer must be"),
        (CallCost, {"round": [1, 1, 1]}, "one number per server"),
        (CallCost, {"round": [1, -1]}, "round must be .* at least 0"),
        (CallCost, {"rows": ()}, "steps of at least one row"),
        (CallCost, {"rows": ((0.5, 1.0),)}, "steps of at least one row"),
        (CallCost, {"rows": ((1, 0.0),)}, "steps of at least one row"),
        (CallCost, {"rows": ((1, -1.0),)}, "rows must be .* at least 0"),
        (CallCost, {"busy": 1.5}, "busy is from 0 to 1"),
        (CallCost, {"busy": np.nan}, "busy must be finite"),
    ],
)
def test_malformed_costs(form, changes, message):
    good = {"state": [1, 1], "call": [1, 1], "devices": [1, 1]}
    if form is CallCost:
        good["round"] = [1, 1]
    form(**good)
    with pytest.raises(UserError, match=message):
        form(**good | changes)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.integers(3, 9), st.integers(0, 2**32 - 1))
def test_parts_of_servers_are_found_again_from_pairs(servers, seed):
    part = np.random.default_rng(seed).gamma(1.0, size=servers)
    pairs = part[:, None] + part
    mean = (pairs.sum(1) - 2 * part) / (servers - 1)
    np.testing.assert_allclose(of_pairs(mean), part, rtol=1e-9, atol=1e-12)


def test_parts_of_few_servers_and_of_pairs_that_do_not_add_up():
    # One pair does not say whose part is whose.
    assert of_pairs(np.array([4.0, 4.0])).tolist() == [2.0, 2.0]
    assert of_pairs(np.array([6.0])).tolist() == [3.0]
    # The second server is near all others, who are far from each other: its part is 0, not less.
    assert of_pairs(np.array([5.0, 1.0, 5.0])).min() == 0.0


def test_malformed_inputs():
    with pytest.raises(UserError, match="bool"):
        Placement(np.ones(SHAPE))
    placement = Placement(np.ones(SHAPE, bool))
    with pytest.raises(UserError, match="do not fit"):
        placement.local_share(np.ones((3, 2, 5)))
    routes = random_routes(0)
    with pytest.raises(UserError, match="routes of 2 servers"):
        placement.traffic(routes[:2])
    with pytest.raises(UserError, match="expert numbers"):
        placement.traffic([routes[0], routes[1] + EXPERTS, routes[2]])
    with pytest.raises(UserError, match="no server has a token"):
        placement.traffic([route[:0] for route in routes])
    with pytest.raises(UserError, match="devices"):
        placement.traffic(routes).load([1, 1])
    with pytest.raises(UserError, match=r"order of calls: \(2, 2\) for 3 servers"):
        placement.layer_time(routes, CallCost.reference([1, 1], K))
    with pytest.raises(UserError, match="cost of 2 servers"):
        placement.traffic(routes).layer_time(CallCost.reference([1, 1], K))
    with pytest.raises(UserError, match=r"weights \(2,\)"):
        placement.layer_time(routes, CallCost.reference([1, 1, 1], K), [1, 1])
