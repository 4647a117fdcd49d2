"""What links and devices cost, from what is known of the servers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dance_jax.config import ClusterSpec, EngineConfig
from dance_jax.launch.costs import cluster_cost, cost_note, exchanged_bytes, preferences
from dance_jax.launch.hosts import parse_hosts
from dance_jax.models import model_config
from dance_jax.placement import Cost
from tests.tiny_models import SERVED

MODEL = model_config(SERVED)
CONFIG = EngineConfig(max_model_len=64)


def cluster(*keys: str) -> ClusterSpec:
    """Servers a (one device), b (two), c (one), with these keys."""
    lines = (
        f"{name} address=localhost experts=9 devices={devices} {more}"
        for name, devices, more in zip("abc", (1, 2, 1), keys, strict=True)
    )
    return parse_hosts("\n".join(lines))


def assert_same(one: Cost, other: Cost) -> None:
    for field in dataclasses.fields(Cost):
        np.testing.assert_allclose(getattr(one, field.name), getattr(other, field.name), rtol=1e-12)


@pytest.mark.parametrize(
    ("wire_dtype", "size"), [("float32", 800), ("bfloat16", 600), ("int8", 504)]
)
def test_bytes_of_a_state_and_its_sum(wire_dtype: str, size: int) -> None:
    config = dataclasses.replace(CONFIG, wire_dtype=wire_dtype)
    assert exchanged_bytes(100, config) == size


def test_nothing_is_known() -> None:
    spec = cluster("", "", "")
    assert_same(cluster_cost(spec, MODEL, CONFIG), Cost.reference([1, 2, 1], MODEL.top_k))
    assert cost_note(spec) is None


def test_rates() -> None:
    """A state of 1,024 bits takes a millisecond of a megabit per second each way; as does a sum."""
    assert MODEL.hidden_size * 4 * 8 == 1024
    spec = cluster("bandwidth=1024kbps", "bandwidth=512kbps", "bandwidth=auto")
    expected = Cost.of_links([2e-3, 4e-3, 2e-3], [1, 2, 1], MODEL.top_k)
    assert_same(cluster_cost(spec, MODEL, CONFIG), expected)
    assert cost_note(spec) == (
        "bandwidth=auto of c is not measured: taken for the fastest that is known."
    )
    assert cost_note(cluster("bandwidth=1024kbps", "", "")) is None


def test_times() -> None:
    """Transfers keep their weight, of which nobody says anything."""
    spec = cluster("bandwidth=1024kbps expert_time=5us", "", "expert_time=7us")
    found = cluster_cost(spec, MODEL, CONFIG)
    links = Cost.of_links([2e-3] * 3, [1, 2, 1], MODEL.top_k)
    assert_same(found, dataclasses.replace(links, call=np.array([5e-6, 6e-6, 7e-6])))


def test_the_sooner_answer_is_preferred() -> None:
    """By the slower link of the two, then by the callee's experts, then around the ring."""
    alike = preferences(cluster("", "", ""), MODEL, CONFIG)
    assert alike.tolist() == [[1, 2, 0], [2, 0, 1], [0, 1, 2]]
    links = cluster("bandwidth=9Mbps", "bandwidth=1Mbps", "bandwidth=9Mbps")
    assert preferences(links, MODEL, CONFIG).tolist() == [[2, 1, 0], [2, 0, 1], [0, 1, 2]]
    rate = "bandwidth=9Mbps expert_time="
    times = cluster(f"{rate}5us", f"{rate}9us", f"{rate}5us")
    assert preferences(times, MODEL, CONFIG).tolist() == [[2, 1, 0], [2, 0, 1], [0, 1, 2]]


def test_times_without_a_rate_do_not_count() -> None:
    spec = cluster("bandwidth=auto expert_time=5us", "bandwidth=auto", "")
    assert_same(cluster_cost(spec, MODEL, CONFIG), Cost.reference([1, 2, 1], MODEL.top_k))
    assert cost_note(spec) == (
        "bandwidth=auto of a, b is not measured: all links count the same, and expert_time= says "
        "nothing."
    )
    made = ClusterSpec(
        tuple(dataclasses.replace(server, measure_bandwidth=False) for server in spec.servers)
    )
    assert str(cost_note(made)).startswith("no link's rate is known: ")
