"""Experts move while a cluster serves: no answer changes, and a failed load changes nothing.

Two of the servers read experts from their copy of the model; the third gets them from the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import httpx
import openai
import pytest

from tests.launch.cold_run import Tiny
from tests.launch.launched import eventually
from tests.serve.served import MODEL, NAMES, Served
from tests.serve.test_cluster import metrics

_Result = TypeVar("_Result")

#: Seconds after which an expected event counts as missing.
PATIENCE_S = 300.0
LENGTH = 100
QUESTIONS = ("Es war einmal", "1 + 1 =", "def f(x):")


@pytest.fixture
def experts(tiny: Tiny) -> Iterator[pathlib.Path]:
    """The folder of the converted model's experts; restored at the end."""
    (path,) = (tiny.folder / "cache" / "models").glob("*/experts")
    away = path.with_name("away")
    yield path
    if away.exists():
        away.rename(path)


def placement(served: Served, rank: int = 0) -> dict[str, Any]:
    return httpx.get(f"{served.urls[rank]}/placement").json()


def rebalance(served: Served, rank: int, **options: bool) -> dict[str, Any]:
    answer = httpx.post(
        f"{served.urls[rank]}/placement/rebalance", json=options, timeout=PATIENCE_S
    )
    assert answer.is_success, answer.text
    return answer.json()


def wait_for(served: Served, what: Any) -> dict[str, Any]:
    """The first /placement that is equal on all servers and fulfils `what`."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = [placement(served, rank) for rank in range(len(NAMES))]
        if found[0] == found[1] == found[2] and what(found[0]):
            return found[0]
        time.sleep(0.02)
    raise AssertionError(f"it does not come: {placement(served)}\n{served.text}")


async def answers(served: Served) -> list[str]:
    """All servers' greedy answers to all questions, asked at once."""

    async def ask(client: openai.AsyncOpenAI, question: str) -> str:
        answer = await client.completions.create(
            model=MODEL, prompt=question, max_tokens=LENGTH, temperature=0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return answer.choices[0].text

    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            )
            for url in served.urls
        ]
        tasks = (ask(client, question) for client in clients for question in QUESTIONS)
        return await asyncio.gather(*tasks)


async def under_load(served: Served, work: Callable[[], _Result], quiet: list[str]) -> _Result:
    """Run `work` in a thread while all servers keep giving the expected answers."""
    done = asyncio.create_task(asyncio.to_thread(work))
    while not done.done():
        assert await answers(served) == quiet
    return await done


def test_experts_move_while_servers_answer(served: Served, experts: pathlib.Path) -> None:
    quiet = asyncio.run(answers(served))
    before = placement(served)

    # A dry run decides but moves nothing.
    decision = rebalance(served, 1, force=True, dry_run=True)
    assert decision["dry_run"] and decision["migrate"] and decision["experts_moved"] > 0
    shown = wait_for(served, lambda found: found["last_decision"] == decision)
    assert (shown["version"], shown["servers"]) == (before["version"], before["servers"])

    # The models of alpha and beta cannot be read: experts stay, and servers answer.
    away = experts.rename(experts.with_name("away"))
    assert rebalance(served, 2, force=True)["migrate"]
    shown = wait_for(served, lambda found: found["last_decision"]["failure"])
    assert (shown["version"], shown["servers"]) == (before["version"], before["servers"])
    served.wait_for("migration cancelled, experts stay where they are", seconds=10)
    assert asyncio.run(answers(served)) == quiet
    found = metrics(httpx.get(f"{served.urls[0]}/metrics").text)
    assert found["migration_failures_total",] == 1 and found["migrations_total",] == 0
    away.rename(experts)

    # Now experts move while servers answer.
    def move() -> tuple[dict[str, Any], dict[str, Any]]:
        decision = rebalance(served, 0, force=True)
        return decision, wait_for(served, lambda found: found["version"] > before["version"])

    decision, after = asyncio.run(under_load(served, move, quiet))
    assert decision["migrate"] and decision["forced"]
    assert after["version"] == before["version"] + 1 and after["last_decision"] == decision
    changed = [
        sum(
            len(set(now) - set(then))
            for now, then in zip(new["resident"], old["resident"], strict=True)
        )
        for new, old in zip(after["servers"], before["servers"], strict=True)
    ]
    # This includes experts loaded from other servers.
    assert sum(changed) == decision["experts_moved"] and changed[2] > 0
    found = metrics(httpx.get(f"{served.urls[2]}/metrics").text)
    assert found["migrations_total",] == 1
    assert found["experts_migrated_total",] == sum(changed)
    assert found["placement_version",] == after["version"]
    assert asyncio.run(answers(served)) == quiet

    # Restarted engines start with the new placement.
    served.kill_engine(1)
    assert asyncio.run(answers(served)) == quiet
    served.wait_for("all engines are running again", seconds=30)
    wait_for(served, lambda found: found["servers"] == after["servers"])
    held = [sum(map(len, server["resident"])) for server in after["servers"]]

    def resident() -> list[float]:
        texts = (httpx.get(f"{url}/metrics").text for url in served.urls)
        return [metrics(text)["experts_resident",] for text in texts]

    assert eventually(lambda: resident() == held, 10), resident()
