"""Costs of links and devices, from what is known about the servers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dance_jax.config import ClusterSpec, EngineConfig
from dance_jax.launch.planning.costs import (
    CALL_S,
    DEFAULT_RATE,
    DEFAULT_ROUND_TRIP,
    SERVICE_STAGGERED,
    cluster_cost,
    cost_note,
    exchanged_bytes,
)
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.models import model_config
from dance_jax.placement.cost import CallCost, Cost, LockStepCost
from tests.tiny_models import SERVED

MODEL = model_config(SERVED)
CONFIG = EngineConfig(max_model_len=64)
LOCK_STEP = dataclasses.replace(CONFIG, exchange="collectives")


#: `--exchange` and its cost class. Which exchange "auto" uses is not known before planning.
EXCHANGES: dict[str, type[CallCost] | type[LockStepCost]] = {
    "auto": CallCost,
    "calls": CallCost,
    "collectives": LockStepCost,
}


def cluster(*keys: str) -> ClusterSpec:
    """Servers a (one device), b (two devices), c (one device), with these keys."""
    lines = (
        f"{name} address=localhost experts=9 devices={devices} {more}"
        for name, devices, more in zip("abc", (1, 2, 1), keys, strict=True)
    )
    return parse_hosts("\n".join(lines))


def assert_same(one: Cost, other: Cost) -> None:
    assert type(one) is type(other) and one.order is None and other.order is None
    for field in dataclasses.fields(one):
        if field.name != "order":
            values = getattr(one, field.name), getattr(other, field.name)
            np.testing.assert_allclose(*values, rtol=1e-12)


@pytest.mark.parametrize(
    ("wire_dtype", "size"), [("float32", 800), ("bfloat16", 600), ("int8", 504)]
)
def test_bytes_of_a_state_and_its_sum(wire_dtype: str, size: int) -> None:
    config = dataclasses.replace(CONFIG, wire_dtype=wire_dtype)
    assert exchanged_bytes(100, config) == size


def test_nothing_is_known() -> None:
    spec = cluster("", "", "")
    for exchange, form in EXCHANGES.items():
        config = dataclasses.replace(CONFIG, exchange=exchange)
        assert_same(cluster_cost(spec, MODEL, config), form.reference([1, 2, 1], MODEL.top_k))
    assert cost_note(spec) is None


def test_users_of_a_service_ask_one_at_a_time() -> None:
    """In lock step the cost is staggered; with calls no server waits for another's tokens."""
    spec = cluster("bandwidth=1024kbps", "", "")
    alone = cluster_cost(spec, MODEL, LOCK_STEP)
    assert isinstance(alone, LockStepCost)
    assert_same(
        cluster_cost(spec, MODEL, LOCK_STEP, service=True), alone.staggered(SERVICE_STAGGERED)
    )
    assert_same(cluster_cost(spec, MODEL, CONFIG, service=True), cluster_cost(spec, MODEL, CONFIG))


def test_rates() -> None:
    """A state of 1,024 bits takes 1 ms each way at 1,024 kbps; so does a sum."""
    assert MODEL.hidden_size * 4 * 8 == 1024
    spec = cluster("bandwidth=1024kbps", "bandwidth=512kbps", "bandwidth=auto")
    links = ([2e-3, 4e-3, 2e-3], [1, 2, 1], MODEL.top_k)
    assert_same(cluster_cost(spec, MODEL, LOCK_STEP), LockStepCost.of_links(*links))
    calls = CallCost.of_links(*links)
    round_n = np.full(3, (DEFAULT_ROUND_TRIP + CALL_S) / 2)
    assert_same(cluster_cost(spec, MODEL, CONFIG), dataclasses.replace(calls, round=round_n))
    assert cost_note(spec) == (
        "bandwidth=auto of c is not measured: it counts as the fastest known rate."
    )
    assert cost_note(cluster("bandwidth=1024kbps", "", "")) is None


def test_round_trips() -> None:
    """Between two servers: the mean of their round trips, plus the time of their programs."""
    spec = cluster("round_trip=20ms", "", "round_trip=4ms")
    found = cluster_cost(spec, MODEL, CONFIG)
    assert isinstance(found, CallCost)
    np.testing.assert_allclose(found.round[:, None] + found.round, [
        [20e-3 + CALL_S, 16e-3 + CALL_S, 12e-3 + CALL_S],
        [16e-3 + CALL_S, 12e-3 + CALL_S, 8e-3 + CALL_S],
        [12e-3 + CALL_S, 8e-3 + CALL_S, 4e-3 + CALL_S],
    ])  # fmt: skip
    # A call also costs the seconds of its links, at a default rate because none is given.
    np.testing.assert_allclose(found.state, 2 * 1024 / DEFAULT_RATE)
    assert cost_note(spec) is None
    timed = cluster("round_trip=20ms expert_time=5us", "", "")
    np.testing.assert_allclose(cluster_cost(timed, MODEL, CONFIG).call, 5e-6)
    assert cost_note(timed) is None


def test_times() -> None:
    """Transfers keep their weight, because no option says anything about them."""
    spec = cluster("bandwidth=1024kbps expert_time=5us", "", "expert_time=7us")
    found = cluster_cost(spec, MODEL, LOCK_STEP)
    links = LockStepCost.of_links([2e-3] * 3, [1, 2, 1], MODEL.top_k)
    assert_same(found, dataclasses.replace(links, call=np.array([5e-6, 6e-6, 7e-6])))
    assert cluster_cost(spec, MODEL, CONFIG).call.tolist() == found.call.tolist()


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_sooner_answer_is_preferred(exchange: str) -> None:
    """Servers prefer by the slower of the two links, the callee's expert time and, if servers call
    each other, the round trip. Equal servers are preferred in ring order."""

    def preferences(*keys: str) -> list[list[int]]:
        config = dataclasses.replace(CONFIG, exchange=exchange)
        return cluster_cost(cluster(*keys), MODEL, config).preferences().tolist()

    ring, second_last = [[1, 2, 0], [2, 0, 1], [0, 1, 2]], [[2, 1, 0], [2, 0, 1], [0, 1, 2]]
    assert preferences("", "", "") == ring
    assert preferences("bandwidth=9Mbps", "bandwidth=1Mbps", "bandwidth=9Mbps") == second_last
    rate = "bandwidth=9Mbps expert_time="
    assert preferences(f"{rate}5ms", f"{rate}9ms", f"{rate}5ms") == second_last
    # A call takes milliseconds, so a few microseconds make no difference.
    assert preferences(f"{rate}5us", f"{rate}9us", f"{rate}5us") == ring
    trips = preferences("round_trip=1ms", "round_trip=9ms", "round_trip=1ms")
    assert trips == (ring if exchange == "collectives" else second_last)


def test_times_without_a_rate_do_not_count() -> None:
    spec = cluster("bandwidth=auto expert_time=5us", "bandwidth=auto", "")
    assert_same(cluster_cost(spec, MODEL, CONFIG), CallCost.reference([1, 2, 1], MODEL.top_k))
    assert cost_note(spec) == (
        "bandwidth=auto of a, b is not measured: all links count the same, and expert_time= has "
        "no effect."
    )
    made = ClusterSpec(
        tuple(dataclasses.replace(server, measure_bandwidth=False) for server in spec.servers)
    )
    assert str(cost_note(made)).startswith("no link's rate is known: ")
