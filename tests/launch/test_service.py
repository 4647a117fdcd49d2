"""How a service survives failures, and when it gives up; with fake front ends (`fake_front`)."""

from __future__ import annotations

import os
import pathlib
import signal
import types
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from dance_jax.config import EngineConfig, ServeOptions, UserError
from dance_jax.launch.cluster import fleet as fleet_module
from dance_jax.launch.cluster import service as service_module
from dance_jax.launch.cluster.fleet import ClusterError
from dance_jax.launch.cluster.independent import IndependentService
from dance_jax.launch.cluster.members import MAX_FAILED_STARTS
from dance_jax.launch.cluster.service import Service
from dance_jax.launch.cluster.together import TogetherService
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.placement.core import Placement
from dance_jax.placement.devices import spread
from tests.serve.fake_front import ENGINE_PID, Script

SPEC = parse_hosts("alpha address=localhost experts=2\nbeta address=localhost experts=2")


class FakeTogether(TogetherService):
    module = "tests.serve.fake_front"


class FakeIndependent(IndependentService):
    module = "tests.serve.fake_front"


Start = Callable[..., Service]


@pytest.fixture(autouse=True)
def short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the wait for other reports of a death: fake front ends report it at once."""
    monkeypatch.setattr(fleet_module, "CAUSE_WINDOW_S", 0.2)
    monkeypatch.setattr(service_module, "CAUSE_WINDOW_S", 0.2)


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Iterator[Start]:
    """start(script of the front ends): makes a service, not started, and cleans up after it."""
    made: list[Service] = []

    def make(drain_seconds: float = 30.0, **script: Any) -> Service:
        options = ServeOptions(
            msgspec.json.encode(Script(**script)).decode(), drain_seconds=drain_seconds
        )
        config = types.SimpleNamespace(top_k=1)
        checkpoint: Any = types.SimpleNamespace(
            path=tmp_path,
            fingerprint="f",
            config=config,
            form=lambda dtype: types.SimpleNamespace(name=dtype),
            expert_bytes=lambda dtype: 1,
        )
        layout = spread(Placement(np.ones((2, 1, 2), bool)), [1, 1], [2, 2])
        calls = script.get("calls")
        engine = EngineConfig(64, exchange="calls" if calls else "collectives")
        kind = FakeIndependent if calls else FakeTogether
        made.append(kind(options, SPEC, checkpoint, layout, engine))
        return made[-1]

    yield make
    for service in made:
        processes = [psutil.Process(pid) for pid in service.pids if psutil.pid_exists(pid or -1)]
        service.stop()
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive


def signal_all(service: Service, number: signal.Signals = signal.SIGUSR1) -> None:
    """Signals all front ends. SIGUSR1: the engines have died."""
    for pid in service.pids:
        assert pid is not None
        os.kill(pid, number)


def served(service: Service) -> list[str]:
    """Serves to the end of the service and returns what the service said meanwhile."""
    said: list[str] = []
    service.serve(lambda name, text: said.append(f"{name}: {text}" if name else text))
    return said


def test_engines_start_anew_until_somebody_wants_an_end(start: Start) -> None:
    """The second server's engine is killed twice, running and starting; all engines restart."""
    service = start(dead_at_once=[1, 2])
    service.start()
    said: list[str] = []

    def notice(name: str, text: str) -> None:
        said.append(f"{name}: {text}" if name else text)
        match said.count("all engines are running again"):
            case 1 if said[-1] == "all engines are running again":
                signal_all(service)
            case 2:
                service.drain()

    signal_all(service)
    service.serve(notice)
    died = f"beta: its engine (process {ENGINE_PID}) was killed by signal 9 (SIGKILL)"
    assert [text.partition(";")[0] for text in said] == [
        died,
        died,
        died,
        "all engines are running again",
        died,
        "all engines are running again",
        "finishing running requests, for at most 30 s",
        "all servers have drained",
    ]


def test_an_engine_that_steps_alone_starts_anew_alone(start: Start) -> None:
    """Even if the engine dies once more while it starts."""
    service = start(calls=True, dead_at_once=[1])
    service.start()
    said: list[str] = []

    def notice(name: str, text: str) -> None:
        said.append(f"{name}: {text}" if name else text)
        if text == "all engines are running again":
            service.drain()

    signal_all(service)
    service.serve(notice)
    died = f"beta: its engine (process {ENGINE_PID}) was killed by signal 9 (SIGKILL)"
    assert [text.partition(";")[0] for text in said[:3]] == [
        died,
        died,
        "all engines are running again",
    ]
    assert "; it restarts" in said[0]
    assert service._starts[:2] == [0, 2]


def test_it_gives_up_when_engines_die_again_and_again(start: Start) -> None:
    service = start(dead_at_once=list(range(1, 20)), says="ValueError: no")
    service.start()
    signal_all(service)
    with pytest.raises(ClusterError) as caught:
        served(service)
    assert f"its engine (process {ENGINE_PID}) failed: ValueError: no" in str(caught.value)
    assert str(caught.value).startswith("server beta")
    assert service._starts == [MAX_FAILED_STARTS] * 2


def test_an_engine_that_cannot_start_at_all_ends_the_launch(start: Start) -> None:
    service = start(dead_at_once=[0])
    with pytest.raises(ClusterError, match=r"server beta .*its engine .* was killed by signal 9"):
        service.start()


def test_what_the_user_can_mend_is_said_to_the_user(start: Start) -> None:
    service = start(dead_at_once=[0], says="/models: there is no model", user=True)
    with pytest.raises(UserError, match="server beta: /models: there is no model"):
        service.start()


def test_a_front_end_that_dies_ends_the_service(start: Start) -> None:
    service = start()
    service.start()
    signal_all(service)
    os.kill(service.pids[1] or 0, signal.SIGKILL)
    with pytest.raises(ClusterError, match=r"server beta \(process \d+\) was killed by signal 9"):
        served(service)


def test_one_front_end_that_is_to_end_drains_all(start: Start) -> None:
    service = start()
    service.start()
    os.kill(service.pids[0] or 0, signal.SIGTERM)
    assert served(service)[-1] == "all servers have drained"


def test_a_server_that_does_not_drain_is_not_waited_for(start: Start, monkeypatch) -> None:
    monkeypatch.setattr(service_module, "DRAIN_MARGIN_S", 0.0)
    service = start(runs_on=True, drain_seconds=0.5)
    service.start()
    service.drain()
    assert served(service)[-1] == "not drained in time: beta"


def test_servers_of_one_machine_have_ports_in_a_row(start: Start) -> None:
    assert start().urls == ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]
