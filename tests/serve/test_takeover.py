"""The launcher of a service is lost: the servers go on, and the next launcher takes them over."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from dance_jax.launch.cli.hosts import change
from dance_jax.launch.cli.stop import stop
from dance_jax.launch.cluster.succession import FILE_NAME
from tests.launch.cold_run import Tiny
from tests.launch.launched import eventually, gone
from tests.launch.tiny import HOSTS
from tests.serve.served import NAMES, Served
from tests.serve.test_restart import Answer, Load

NO_LAUNCHER = "the launcher does not answer"


class Site:
    """Launches, one after the other, of the same service with a state directory."""

    def __init__(self, tiny: Tiny, folder: pathlib.Path) -> None:
        self.tiny, self.folder, self.state = tiny, folder, folder / "state"
        self.hosts = folder / "hosts.txt"
        self.hosts.write_text(HOSTS)
        self.launches: list[Served] = []

    @property
    def first(self) -> Served:
        """The launch that started the servers."""
        return self.launches[0]

    def launch(self, *options: str, seen: str = "curl ") -> Served:
        """Starts a launcher, and waits until it has printed a text."""
        folder = self.folder / str(len(self.launches))
        folder.mkdir()
        port = self.first.port if self.launches else None
        words = "--state-dir", self.state, "--hosts", self.hosts, *options
        found = Served(self.tiny, folder, *words, port=port)
        self.launches.append(found)
        found.wait_for(seen)
        return found

    def end(self) -> None:
        stop(self.state, now=True)
        for launch in self.launches:
            launch.kill()


@pytest.fixture(scope="module")
def site(
    compiled: pathlib.Path, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    site = Site(tiny, tmp_path_factory.mktemp("site"))
    try:
        site.launch()
        yield site
    finally:
        site.end()


@contextlib.contextmanager
def watched(url: str) -> Iterator[None]:
    """Within the context, somebody watches at a server."""
    with httpx.stream("GET", f"{url}/events", timeout=60) as stream:
        next(stream.iter_lines())
        yield


def rebalance(site: Site) -> httpx.Response:
    """Asks for a migration."""
    url = f"{site.first.urls[0]}/placement/rebalance"
    return httpx.post(url, json={"force": True}, timeout=120)


def test_requests_go_on_without_a_launcher_and_under_the_next_one(site: Site) -> None:
    async def ask(lose: bool) -> list[Answer]:
        async with Load(site.first) as running:
            if lose:
                site.first.process.kill()
                await asyncio.to_thread(site.launch)
            return await running.answers()

    before = asyncio.run(asyncio.wait_for(ask(lose=False), 120))
    assert asyncio.run(asyncio.wait_for(ask(lose=True), 120)) == before
    assert "taking over the servers" in site.launches[1].text
    assert httpx.get(f"{site.first.urls[0]}/health").json()["lost"] == []


def test_the_next_launcher_restarts_engines_and_moves_experts(site: Site) -> None:
    launcher = site.launches[1]
    # Viewers of a dashboard do not disturb an engine that starts.
    with watched(site.first.urls[0]), watched(site.first.urls[1]):
        site.first.kill_engine(1)
        assert eventually(lambda: "all engines are running again" in launcher.text), launcher.text
    assert launcher.text.count("its engine") == 1, launcher.text
    assert rebalance(site).json()["forced"]


def test_a_server_leaves_and_comes_back_while_others_serve(site: Site) -> None:
    """No request of the others is lost or changed."""
    others: Any = types.SimpleNamespace(urls=[site.first.urls[0], site.first.urls[2]])

    def changed(action: str, name: str) -> int:
        return change(action, name, site.hosts, site.state)

    async def ask(*actions: str) -> list[Answer]:
        async with Load(others) as running:
            for action in actions:
                assert await asyncio.to_thread(changed, action, NAMES[1]) == 0
            return await running.answers()

    before = asyncio.run(asyncio.wait_for(ask(), 120))
    assert asyncio.run(asyncio.wait_for(ask("drain", "add"), 240)) == before
    health = httpx.get(f"{site.first.urls[0]}/health").json()
    assert sorted(health["alive"]) == [*NAMES] and health["lost"] == []
    assert httpx.get(f"{site.first.urls[1]}/ready").status_code == 200
    lines = site.hosts.read_text()
    assert changed("remove", NAMES[2]) == 1  # the others lack memory
    assert site.hosts.read_text() == lines


def test_a_second_launcher_is_refused_while_one_runs(site: Site) -> None:
    second = site.launch(seen="is in use by another launcher (process ")
    assert second.process.wait(30) == 2


def test_without_a_launcher_experts_stay_and_other_options_are_refused(site: Site) -> None:
    """Then `stop` ends the servers."""
    site.launches[1].process.kill()
    other = site.launch("--max-queue", "7", seen="with another max_queue; start with the same")
    assert other.process.wait(30) == 2

    answer = eventually(lambda: NO_LAUNCHER in (found := rebalance(site)).text and found, 30)
    assert answer.status_code == 503
    servers = [each for each in site.first.started if each.is_running()]
    assert servers and stop(site.state, now=True) == 0
    assert gone(servers, 10)
    assert not (site.state / FILE_NAME).exists()
    for launch in site.launches:
        assert list(launch.private.iterdir()) == []
