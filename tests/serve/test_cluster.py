"""OpenAI's client against three local servers that share their experts."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.served import MODEL, NAMES, Served

PROMPTS = ["Es war einmal", "1 + 1 =", "def f(x):", "x" * 90]
CHAT: Any = [{"role": "user", "content": "hello"}]
#: Seconds after which an expected event counts as missing.
PATIENCE_S = 60.0
GREEDY: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 24,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}


async def answers(url: str) -> list[str]:
    """One server's answers to all prompts at once, streamed and not, and to a chat."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        async def streamed(prompt: str) -> str:
            chunks = await client.completions.create(prompt=prompt, stream=True, **GREEDY)
            return "".join([chunk.choices[0].text async for chunk in chunks])

        async def chat() -> str:
            answer = await client.chat.completions.create(messages=CHAT, **GREEDY)
            assert answer.usage is not None and answer.usage.completion_tokens == 24
            return answer.choices[0].message.content or ""

        async def together() -> list[str]:
            answer = await client.completions.create(prompt=PROMPTS, **GREEDY)
            return [choice.text for choice in answer.choices]

        streams = asyncio.gather(*(streamed(prompt) for prompt in PROMPTS))
        texts, said, streams = await asyncio.gather(together(), chat(), streams)
    assert texts == streams and all(texts)
    return [*texts, said]


def test_three_servers_say_the_same(served: Served) -> None:
    async def ask_all() -> list[list[str]]:
        return await asyncio.gather(*(answers(url) for url in served.urls))

    first, *others = asyncio.run(ask_all())
    assert others == [first, first]


def test_every_server_tells_what_it_did(served: Served) -> None:
    asyncio.run(answers(served.urls[0]))
    placements = []
    for rank, url in enumerate(served.urls):
        with httpx.Client(base_url=url) as http:
            assert http.get("/health").is_success
            assert http.get("/ready").json() == {"ready": True}
            placements.append(http.get("/placement").json())
            found = metrics_after_work(http)
        resident = placements[-1]["servers"][rank]["resident"]
        assert found["experts_resident",] == sum(map(len, resident))
        for name in set(NAMES) - {NAMES[rank]}:
            assert found["link_bytes_total", "sent", name] > 0
            assert found["link_bytes_total", "received", name] > 0
        if rank == 0:
            assert found["expert_calls_total", "local"] > 0
            assert found["expert_calls_total", "remote"] > 0
            assert 0 < found["local_share",] < 1
            assert found["request_success_total", "length"] > 0
    assert placements[0] == placements[1] == placements[2]
    assert [server["name"] for server in placements[0]["servers"]] == list(NAMES)


def metrics_after_work(http: httpx.Client) -> dict[tuple[str, ...], float]:
    """/metrics after a report that shows work; engines report only at intervals."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = metrics(http.get("/metrics").text)
        links = [value for key, value in found.items() if key[0] == "link_bytes_total"]
        if links and all(links):
            return found
    raise AssertionError(f"no report of {http.base_url} shows work")


def metrics(text: str) -> dict[tuple[str, ...], float]:
    """(name without prefix, labels except the model's, ordered by name) -> value."""
    return {
        (
            sample.name.removeprefix("dance_jax:"),
            *(value for name, value in sorted(sample.labels.items()) if name != "model_name"),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
