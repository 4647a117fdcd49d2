"""A service on the terminal, and the signals that end the service."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
from typing import Any

import pytest
from rich.console import Console

from dance_jax.config import ServeOptions
from dance_jax.launch.cli.attend import attend, greeting
from dance_jax.launch.planning.hosts import parse_hosts

SPEC = parse_hosts("alpha address=10.0.0.1 experts=1\nb address=10.0.0.2 ssh=me@gate experts=1")


class Service:
    """A fake service that sends signals to this process while it serves."""

    def __init__(self, *signals: signal.Signals) -> None:
        self.spec = SPEC
        self.urls = ["http://127.0.0.1:8000", "http://127.0.0.1:8000"]
        self.options, self.sampling = ServeOptions("m"), {}
        self.drained = 0
        self._signals = signals

    def drain(self) -> None:
        self.drained += 1

    def serve(self, notice: Any) -> None:
        for number in self._signals:
            os.kill(os.getpid(), number)
        notice("alpha", "says so")


def test_how_the_model_samples_is_said() -> None:
    service: Any = Service()
    service.sampling = {"temperature": 0.6}
    assert any("samples with temperature=0.6 unless" in line for line in greeting(service))


def test_where_servers_are_reached() -> None:
    service: Any = Service()
    alpha, b, curl, _ = greeting(service)
    assert alpha.split() == ["alpha", "http://127.0.0.1:8000", "(on", "10.0.0.1)"]
    assert b.split() == ["b", "http://127.0.0.1:8000", "(on", "me@gate)"]
    assert curl.startswith("curl http://127.0.0.1:8000/v1/") and "Authorization" not in curl
    service.options = dataclasses.replace(service.options, bind="0.0.0.0", api_key="secret")
    _, b, curl, _ = greeting(service)
    assert "gate" not in b
    assert "Bearer" in curl and "secret" not in curl


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM, signal.SIGINT)],
)
def test_signals_drain(signals: tuple[signal.Signals, ...]) -> None:
    service: Any = Service(*signals)
    console = Console(file=io.StringIO(), width=200)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    attend(service, console)
    assert service.drained == len(signals)
    assert console.file.getvalue().splitlines()[-1] == "alpha: says so"  # type: ignore
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_second_interrupt_ends_at_once() -> None:
    service: Any = Service(signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        attend(service, Console(file=io.StringIO()))
    assert service.drained == 1


def test_an_ignored_interrupt_stays_ignored() -> None:
    """A shell without job control starts its background commands so."""
    service: Any = Service(signal.SIGINT, signal.SIGINT, signal.SIGTERM)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        attend(service, Console(file=io.StringIO()))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert service.drained == 1
