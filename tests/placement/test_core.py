"""Placement, its metrics against a plain reading of their definitions, and its file."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.config import UserError
from dance_jax.placement import Cost, Placement
from dance_jax.placement.cost import apart_share

SHAPE, TOKENS, K = (3, 2, 6), 8, 3
LAYERS, EXPERTS = SHAPE[1:]


@st.composite
def placements(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    resident = rng.random(SHAPE) < draw(st.sampled_from([0.0, 0.3, 0.7]))
    home = rng.integers(0, SHAPE[0], SHAPE[1:])
    return Placement(resident | (np.arange(SHAPE[0])[:, None, None] == home))


def random_routes(seed, lengths=(TOKENS, TOKENS - 3, 1)):
    rng = np.random.default_rng(seed)
    return [
        np.argsort(rng.random((length, LAYERS, EXPERTS)), axis=2)[:, :, :K] for length in lengths
    ]


def plain_metrics(resident, routes, devices):
    """Flows by one loop per token: (remote, transfers, busiest, load)."""
    num_servers = len(resident)
    flow = np.zeros((LAYERS, num_servers, num_servers))
    calls = np.zeros((LAYERS, num_servers))
    remote, visits = np.zeros(num_servers), np.zeros(num_servers)
    for n, route in enumerate(routes):
        for token in route:
            for layer in range(LAYERS):
                missing = [e for e in token[layer] if not resident[n, layer, e]]
                chosen = next(
                    servers
                    for size in range(num_servers + 1)
                    for servers in itertools.combinations(range(num_servers), size)
                    if all(resident[list(servers), layer, e].any() for e in missing)
                )
                remote[n] += len(missing) / (len(route) * LAYERS * K)
                visits[n] += len(chosen) / (len(route) * LAYERS)
                for m in chosen:
                    flow[layer, n, m] += 1 / len(route)
                for e in token[layer]:
                    at = n if e not in missing else min(m for m in chosen if resident[m, layer, e])
                    calls[layer, at] += 1 / (len(route) * K * num_servers)
    ways = np.concatenate([flow.sum(2), flow.sum(1)], axis=1)
    load = (calls / np.array(devices)).max(1).mean()
    return remote.mean(), visits.mean(), ways.max(1).mean(), load


def plain_layer_time(resident, routes, cost, weights):
    """Seconds of each layer by what every server sends, receives and computes, one at a time."""
    num_servers = len(resident)
    flows = Placement(resident).traffic(routes)
    seconds = []
    for layer in range(LAYERS):
        sent = flows.transfers_lnn[layer] * np.array(weights)[:, None]
        calls = flows.calls_lnn[layer] * np.array(weights)[:, None]
        link = max(cost.state[n] * max(sent[n].sum(), sent[:, n].sum()) for n in range(num_servers))
        device = max(cost.call[n] * calls[:, n].sum() / cost.devices[n] for n in range(num_servers))
        seconds.append(link + device + cost.transfer * sent.sum() / num_servers + cost.layer)
    return np.mean(seconds)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(placements(), st.integers(0, 2**32 - 1))
def test_metrics_follow_their_definitions(placement, seed):
    routes, devices = random_routes(seed), [1, 1, 2]
    got = (
        placement.remote(routes),
        placement.transfers(routes),
        placement.busiest(routes),
        placement.load(routes, devices),
    )
    assert got == pytest.approx(plain_metrics(placement.resident, routes, devices), abs=1e-12)


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
    cost = Cost(rng.random(3), rng.random(3), rng.integers(1, 4, 3), rng.random(), rng.random())
    weights = rng.random(3)
    want = plain_layer_time(placement.resident, routes, cost, weights)
    assert placement.layer_time(routes, cost, weights) == pytest.approx(want)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(placements(), st.integers(0, 2**32 - 1))
def test_servers_with_tokens_one_at_a_time(placement, seed):
    """All transfers then pass a busiest link: a layer of each server's token alone, added up."""
    routes = random_routes(seed)
    cost = Cost(np.full(3, 2.0), np.zeros(3), np.ones(3, int), 0.7)
    alone = [
        placement.layer_time([r if m == n else r[:0] for m, r in enumerate(routes)], cost)
        for n in range(3)
    ]
    per_transfer = cost.transfer * placement.traffic(routes).transfers
    want = sum(alone) - 3 * per_transfer + per_transfer
    assert placement.layer_time(routes, cost.apart(1.0)) == pytest.approx(want)
    half = (placement.layer_time(routes, cost) + want) / 2
    assert placement.layer_time(routes, cost.apart(0.5)) == pytest.approx(half)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(placements(), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_how_often_that_was_is_found_again(placement, seed, share):
    """From what passed the busiest links while servers had tokens at once, and one at a time."""
    traffic = placement.traffic(random_routes(seed))
    together = traffic.concentration()
    if not traffic.transfers:
        assert together == 1.0 and apart_share(1.0, together) == 0.0
        return
    assert together == pytest.approx(traffic.busiest / traffic.transfers / 3)
    observed = (1 - share) * together + share
    assert apart_share(observed, together) == pytest.approx(share if together < 1 else 0.0)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(placements(), st.integers(0, 2**32 - 1))
def test_layer_time_of_the_reference_is_the_weighted_sum(placement, seed):
    routes, devices = random_routes(seed), [1, 1, 2]
    traffic = placement.traffic(routes)
    want = traffic.busiest + traffic.load(devices) + 0.3 * traffic.transfers
    assert placement.layer_time(routes, Cost.reference(devices, K)) == pytest.approx(want)
    # Links of one speed change the unit alone.
    slow = Cost.of_links([2e-6] * 3, devices, K)
    assert placement.layer_time(routes, slow) == pytest.approx(2e-6 * want)
    alone = traffic.busiest + traffic.load() + 0.3 * traffic.transfers
    assert placement.layer_time(routes) == pytest.approx(alone)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(placements(), st.integers(0, 2**32 - 1), st.permutations(range(3)))
def test_metrics_do_not_depend_on_names(placement, seed, order):
    """Renumbering experts changes nothing; renumbering servers keeps what ties cannot change."""
    routes = random_routes(seed)
    rng = np.random.default_rng(seed)
    names = rng.permutation(EXPERTS)
    renamed = Placement(placement.resident[:, :, np.argsort(names)])
    new_routes = [names[route] for route in routes]
    for metric in ("remote", "transfers", "busiest", "load"):
        want = getattr(placement, metric)(routes)
        assert getattr(renamed, metric)(new_routes) == pytest.approx(want)
    moved = Placement(placement.resident[list(order)])
    for metric in ("remote", "transfers"):
        want = getattr(placement, metric)(routes)
        assert getattr(moved, metric)([routes[n] for n in order]) == pytest.approx(want)


def test_everything_everywhere_moves_nothing():
    placement = Placement(np.ones(SHAPE, bool))
    traffic = placement.traffic(random_routes(0))
    assert (traffic.remote, traffic.transfers, traffic.busiest) == (0, 0, 0)
    assert traffic.load([1, 1, 2]) == pytest.approx(1 / 3)


def test_a_server_without_tokens_is_left_out():
    placement = Placement(np.arange(3)[:, None, None] == np.zeros(SHAPE[1:], int))
    traffic = placement.traffic(random_routes(0, lengths=(4, 4, 0)))
    assert traffic.remote == traffic.transfers == pytest.approx(0.5)
    assert traffic.busiest == pytest.approx(1)
    assert traffic.load() == pytest.approx(1)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(placements(), st.integers(0, 2**32 - 1))
def test_local_share_is_what_remote_measures(placement, seed):
    routes = random_routes(seed, lengths=(5, 5, 5))
    counts = np.zeros(SHAPE, np.int64)
    for n, route in enumerate(routes):
        for layer in range(LAYERS):
            np.add.at(counts[n, layer], route[:, layer].ravel(), 1)
    assert placement.local_share(counts) == pytest.approx(1 - placement.remote(routes))
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
    ("arguments", "message"),
    [
        (([1, 1], [1], [1, 1]), "one number per server"),
        (([1.0, np.nan], [1, 1], [1, 1]), "state must be finite"),
        (([1, 1], [1, -1], [1, 1]), "call must be .* at least 0"),
        (([1, 1], [1, 1], [1, 0]), "whole number of devices"),
        (([1, 1], [1, 1], [1.0, 1.0]), "whole number of devices"),
        (([1, 1], [1, 1], [1, 1], -1.0), "transfer must be"),
        (([1, 1], [1, 1], [1, 1], 0.0, np.inf), "layer must be"),
    ],
)
def test_malformed_costs(arguments, message):
    with pytest.raises(UserError, match=message):
        Cost(*arguments)


def test_malformed_inputs():
    with pytest.raises(UserError, match="bool"):
        Placement(np.ones(SHAPE))
    placement = Placement(np.ones(SHAPE, bool))
    with pytest.raises(UserError, match="do not fit"):
        placement.local_share(np.ones((3, 2, 5)))
    routes = random_routes(0)
    with pytest.raises(UserError, match="routes of 2 servers"):
        placement.remote(routes[:2])
    with pytest.raises(UserError, match="expert numbers"):
        placement.remote([routes[0], routes[1] + EXPERTS, routes[2]])
    with pytest.raises(UserError, match="no server has a token"):
        placement.remote([route[:0] for route in routes])
    with pytest.raises(UserError, match="devices"):
        placement.load(routes, [1, 1])
    with pytest.raises(UserError, match="cost of 2 servers"):
        placement.layer_time(routes, Cost.reference([1, 1], K))
    with pytest.raises(UserError, match=r"weights \(2,\)"):
        placement.layer_time(routes, Cost.reference([1, 1, 1], K), [1, 1])
