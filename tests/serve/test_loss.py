"""Whole servers are lost and come back; the others serve on, with the same tokens."""

from __future__ import annotations

import asyncio
import json
import pathlib
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.launch.cold_run import Tiny
from tests.launch.launched import eventually, kill_all
from tests.serve.served import NAMES, Served, serving
from tests.serve.test_restart import Answer, Load, get

#: All 32 experts fit into alpha and either of the others, but not into beta and gamma. Gamma has no
#: copy of the model.
HOSTS = """\
alpha address=localhost experts=22
beta  address=localhost experts=10
gamma address=localhost experts=10 checkpoint=peer
"""


@pytest.fixture(scope="module")
def unequal(
    compiled: pathlib.Path, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("unequal")
    (folder / "hosts.txt").write_text(HOSTS)
    with serving(tiny, folder, "--hosts", folder / "hosts.txt") as cluster:
        yield cluster


def load(served: Served, *ranks: int) -> Load:
    """All questions to some of the servers, which have accepted them."""
    some: Any = types.SimpleNamespace(urls=[served.urls[rank] for rank in ranks])
    return Load(some, accepted=True)


def lose(served: Served, rank: int) -> None:
    """Kills all processes of a server."""
    front = served.front(rank)
    kill_all([front, *front.children(recursive=True)])


def answers(served: Served, *ranks: int, lost: int | None = None) -> list[Answer]:
    """The answers of some servers, while another one is lost under load."""

    async def ask() -> list[Answer]:
        async with load(served, *ranks) as running:
            if lost is not None:
                lose(served, lost)
            return await running.answers()

    return asyncio.run(asyncio.wait_for(ask(), 120))


def is_ready(url: str) -> bool:
    try:
        get(f"{url}/ready")
    except OSError:
        return False
    return True


def refusal(url: str) -> tuple[int, str, str | None] | None:
    """Status, message and Retry-After of a refused question; None if the server answers."""
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    request = urllib.request.Request(
        f"{url}/v1/completions", body, {"Content-Type": "application/json"}
    )
    try:
        urllib.request.urlopen(request, timeout=30).close()
    except urllib.error.HTTPError as error:
        message = json.load(error)["error"]["message"]
        return error.code, message, error.headers["Retry-After"]
    return None


def wait_until_whole(served: Served, rank: int, times: int) -> None:
    """Waits until all servers run again for the nth time, and notes the new processes."""
    text = "all engines are running again"
    assert eventually(lambda: served.text.count(text) >= times, 60), served.text
    assert eventually(lambda: is_ready(served.urls[rank]), 10)
    served.note_workers()
    # The front end that was started last is the youngest process.
    fronts = [p for p in served.workers if "dance_jax.serve.frontend" in p.cmdline()]
    served.workers = [*fronts[:rank], fronts[-1], *fronts[rank:-1]]


@pytest.mark.slow  # benchmarks/chaos.py loses servers in each CI run
def test_a_lost_server_costs_the_others_no_token(unequal: Served) -> None:
    """The others load its experts; one of them reads them from the files of the other."""
    before = answers(unequal, 0, 1)
    whole = answers(unequal, 2)
    assert answers(unequal, 0, 1, lost=2) == before
    name = NAMES[2]
    assert f"{name}: (process {unequal.front(2).pid}) was killed by signal 9" in unequal.text
    wait_until_whole(unequal, 2, times=1)
    assert "experts of lost servers are loaded" in unequal.text
    assert answers(unequal, 2) == whole
    assert answers(unequal, 0, 1) == before


def test_requests_wait_for_a_server_that_the_others_cannot_replace(unequal: Served) -> None:
    """New requests are refused meanwhile, with the reason."""
    before, whole = answers(unequal, 1), unequal.text.count("all engines are running again")
    refused: list[Any] = []

    async def ask() -> list[Answer]:
        async with load(unequal, 1) as running:
            lose(unequal, 0)
            # The server hears of the loss a little later than the launcher.
            while await asyncio.to_thread(is_ready, unequal.urls[1]):
                await asyncio.sleep(0.01)
            refused.append(await asyncio.to_thread(refusal, unequal.urls[1]))
            return await running.answers()

    assert asyncio.run(asyncio.wait_for(ask(), 120)) == before
    ((status, message, retry_after),) = refused
    assert status == 503 and retry_after is not None
    assert "of the model's experts while alpha is gone" in message
    wait_until_whole(unequal, 0, times=whole + 1)
    assert eventually(lambda: refusal(unequal.urls[1]) is None, 10)


def test_nothing_is_left_at_the_end(unequal: Served) -> None:
    unequal.note_workers()
    unequal.process.terminate()
    assert unequal.process.wait(40) == 0, unequal.text
    psutil.wait_procs(unequal.started, timeout=5)
    unequal.assert_nothing_left()
