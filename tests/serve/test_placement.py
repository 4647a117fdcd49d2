"""/placement, and its requests to the launcher."""

from __future__ import annotations

import dataclasses

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from dance_jax.launch.control.protocol import Decided, Placed, RebalanceWanted
from dance_jax.placement.core import Placement
from dance_jax.placement.devices import spread
from dance_jax.serve.app import ServeInfo
from dance_jax.serve.keys import Keys
from dance_jax.serve.placement_state import PlacementState
from tests.serve.scripted import ScriptedQueue, client, decision, error, layout


def test_what_the_launcher_says_is_shown(info: ServeInfo) -> None:
    experts = PlacementState(layout())
    http = client(ScriptedQueue(), info, experts)
    assert http.get("/placement").json()["last_decision"] is None
    swapped = Placement(np.asarray(layout().device_of >= 0)[::-1])
    made = dataclasses.replace(decision(RebalanceWanted(0, True, False)), failure="torn")
    experts.placed(Placed(5, b"", made, 3, 1, 44, 7, [1]), spread(swapped, [1, 1], [20, 20]))
    answer = http.get("/placement").json()
    assert answer["version"] == 5
    assert answer["lost"] == [info.servers[1]]
    alive, lost = info.servers
    assert http.get("/health").json() == {"epoch": 7, "alive": [alive], "lost": [lost]}
    assert answer["servers"][0]["resident"] == [list(range(8, 16))] * 2
    assert answer["last_decision"] == {
        "when": 1_700_000_000.0,
        "policy": "latency",
        "forced": True,
        "dry_run": False,
        "migrate": True,
        "reason": "it pays",
        "present_seconds": 4.0,
        "expected_seconds": 3.0,
        "migration_seconds": 0.5,
        "experts_moved": 7,
        "gain": 0.25,
        "failure": "torn",
        "servers": [],
    }
    found = {
        sample.name.removeprefix("dance_jax:"): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    }
    assert found["placement_version"] == 5 and found["placement_decisions_total"] == 1
    assert found["placement_present_seconds"] == 4.0 and found["placement_gain"] == 0.25
    assert found["migrations_total"] == 3
    assert found["migration_failures_total"] == 1
    assert found["experts_migrated_total"] == 44


def test_a_decision_on_request(info: ServeInfo) -> None:
    http = client(ScriptedQueue(), info)
    answer = http.post("/placement/rebalance", json={"force": True}).json()
    assert (answer["forced"], answer["dry_run"], answer["migrate"]) == (True, False, True)
    answer = http.post("/placement/rebalance", json={"dry_run": True}).json()
    assert (answer["forced"], answer["dry_run"]) == (False, True)
    assert http.post("/placement/rebalance", json={}).json()["forced"] is False
    error(http.post("/placement/rebalance", json={"force": 1}), 400)
    assert error(http.post("/placement/rebalance", json={"forced": True}), 400)["param"] == "forced"


def test_where_experts_are_to_be(info: ServeInfo) -> None:
    """The response of /placement can be changed and sent back."""
    wanted: list[RebalanceWanted] = []

    def ask(asked: RebalanceWanted) -> None:
        wanted.append(asked)
        experts.decided(Decided(asked.id, decision(asked), ""))

    experts = PlacementState(layout(), ask)
    http = client(ScriptedQueue(), info, experts)
    servers = http.get("/placement").json()["servers"]
    held = [server["resident"] for server in servers]
    servers[0]["resident"] = [list(range(8)), list(range(9, -1, -1))]
    answer = http.post("/placement/rebalance", json={"servers": servers[::-1]})
    assert answer.status_code == 200, answer.text
    assert wanted[0].resident == [[list(range(8)), list(range(9, -1, -1))], held[1]]
    for bad, said in (
        (servers[:1], "exactly once"),
        ([servers[0], servers[0]], "exactly once"),
        ([servers[0] | {"resident": held[0][:1]}, servers[1]], "each of the 2 MoE layers"),
        ([servers[0] | {"resident": [[16], []]}, servers[1]], "no expert 16"),
        ([servers[0] | {"resident": [[], []]}, servers[1]], "on no server"),
        ([servers[0] | {"resident": [list(range(16))] * 2}, servers[1]], "slots"),
    ):
        answer = error(http.post("/placement/rebalance", json={"servers": bad}), 400)
        assert said in answer["message"] and answer["param"] == "servers"
    assert len(wanted) == 1


def test_nobody_decides(info: ServeInfo) -> None:
    """There is no launcher, or the launcher is about to exit."""
    http = client(ScriptedQueue(), info, PlacementState(layout()))
    error(http.post("/placement/rebalance", json={}), 503)
    experts = PlacementState(
        layout(), lambda wanted: experts.decided(Decided(wanted.id, None, "it ends"))
    )
    http = client(ScriptedQueue(), info, experts)
    answer = http.post("/placement/rebalance", json={})
    assert "it ends" in error(answer, 503)["message"]
    assert int(answer.headers["retry-after"]) > 0


def test_who_waits_is_told_of_the_end(info: ServeInfo) -> None:
    asked: list[RebalanceWanted] = []

    def ask(wanted: RebalanceWanted) -> None:
        asked.append(wanted)
        experts.close()

    experts = PlacementState(layout(), ask)
    http = client(ScriptedQueue(), info, experts)
    for _ in range(2):  # the second one comes after the end
        answer = http.post("/placement/rebalance", json={})
        assert "shutting down" in error(answer, 503)["message"]
    assert len(asked) == 1


def test_it_needs_the_key(info: ServeInfo) -> None:
    http = client(ScriptedQueue(), dataclasses.replace(info, keys=Keys(["k"])))
    error(http.post("/placement/rebalance", json={"force": True}), 401)
