"""Engines die under load and servers shut down: no answer is lost, and nothing is left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import pathlib
import re
import signal
import socket
import urllib.request
from typing import Any

import openai
import psutil
import pytest

from tests.launch.cold_run import Tiny
from tests.launch.launched import Launch, free_ports
from tests.serve.served import MODEL, NAMES, Served, serving

#: Questions to every server at once. The first answer is streamed; the other questions are asked
#: COPIES times, so that more requests are in flight than can run at the same time.
COPIES = 6
QUESTIONS: tuple[dict[str, Any], ...] = (
    {"prompt": "Es war einmal", "temperature": 0},
    {"prompt": "1 + 1 =", "temperature": 1.0, "seed": 11},
    {"prompt": "def f(x):", "temperature": 0},
    {"prompt": "On and on", "temperature": 0.8, "seed": 12, "n": 2},
    {
        "prompt": "The end",
        "temperature": 0.9,
        "seed": 13,
        "extra_body": {"guided_regex": "([a-z]{2,9} ){99}"},
    },
)
#: The questions to a server, by number.
NUMBERS = (0, *tuple(range(1, len(QUESTIONS))) * COPIES)
LENGTH = 230
#: Chunks of the streamed answer that every server has sent before a test interferes.
UNDER_WAY = 8
#: Seconds of a pause, such as a suspended machine's.
PAUSE_S = 7.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """The texts and finish reasons of a completion, by number of the choice."""

    texts: dict[int, str]
    reasons: dict[int, str]


class Load:
    """All questions to all servers of a cluster.

    This is an async context manager: inside it, the questions are on their way.

    Args:
        served: the cluster.
        accepted: stream all answers, and begin when the servers have accepted all questions.
            Otherwise a question may still be on its way.
    """

    def __init__(self, served: Served, accepted: bool = False) -> None:
        self._streamed = accepted
        self._urls = served.urls
        self._clients = [
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            for url in served.urls
        ]
        self._begun = [asyncio.Event() for _ in served.urls]

    async def __aenter__(self) -> Load:
        # Warm up each server, so that all answers start together.
        for client in self._clients:
            await client.completions.create(model=MODEL, prompt="a", max_tokens=1)
        self._answers = [
            [asyncio.create_task(self._ask(rank, number)) for number in NUMBERS]
            for rank in range(len(self._clients))
        ]
        for event in self._begun:
            await event.wait()
        for url, own in zip(self._urls, self._answers, strict=True) if self._streamed else ():
            while await asyncio.to_thread(metric, url, "requests_in_flight") + sum(
                answer.done() for answer in own
            ) < len(NUMBERS):
                await asyncio.sleep(0.01)
        for own in self._answers:
            assert not all(answer.done() for answer in own), "too little for this machine"
        return self

    async def __aexit__(self, *_: object) -> None:
        for answer in itertools.chain(*self._answers):
            answer.cancel()
        for client in self._clients:
            await client.close()

    async def answers(self) -> list[Answer]:
        return await asyncio.gather(*itertools.chain(*self._answers))

    async def _ask(self, rank: int, number: int) -> Answer:
        create = self._clients[rank].completions.create
        question, answer, count = QUESTIONS[number], Answer({}, {}), 0
        asked: dict[str, Any] = {"model": MODEL, "max_tokens": LENGTH, **question}
        asked["extra_body"] = {"ignore_eos": True, **question.get("extra_body", {})}
        if number > 0 and not self._streamed:
            whole = await create(**asked)
            for choice in whole.choices:
                answer.texts[choice.index] = choice.text
                answer.reasons[choice.index] = choice.finish_reason
                if "guided_regex" in asked["extra_body"]:
                    assert re.fullmatch("([a-z]{2,9} )*[a-z]{0,9}", choice.text), choice.text
            return answer
        chunks = await create(**asked, stream=True)
        async for chunk in chunks:
            for choice in chunk.choices:
                answer.texts[choice.index] = answer.texts.get(choice.index, "") + choice.text
                if choice.finish_reason is not None:
                    answer.reasons[choice.index] = choice.finish_reason
            count += 1
            if number == 0 and count == UNDER_WAY:
                self._begun[rank].set()
        return answer


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:
        return response.read().decode()


#: Servers whose engine dies: the first, to which all others are connected, and one without a copy
#: of the model. test_migration.py kills the engine of the remaining server.
VICTIMS = (0, 2)


def metric(url: str, name: str) -> int:
    """The value of a metric of a server."""
    (count,) = (
        line.rpartition(" ")[2]
        for line in get(f"{url}/metrics").splitlines()
        if line.startswith(f"dance_jax:{name}{{")
    )
    return int(float(count))


def restarts(url: str) -> int:
    return metric(url, "engine_restarts_total")


@pytest.fixture(scope="module")
def quiet(served: Served) -> list[Answer]:
    """The cluster's answers without interference."""

    async def ask() -> list[Answer]:
        async with Load(served) as load:
            return await load.answers()

    answers = asyncio.run(asyncio.wait_for(ask(), 120))
    for answer in answers:
        assert set(answer.reasons.values()) == {"length"}
    return answers


@pytest.mark.slow  # benchmarks/chaos.py kills engines in each CI run
def test_every_answer_arrives_whichever_engine_dies(
    served: Served, quiet: list[Answer], expert_library: pathlib.Path | None
) -> None:
    """Every answer is the same as without a death, greedy or sampled with a seed."""
    before = [restarts(url) for url in served.urls]

    async def ask(victim: int) -> tuple[int, list[Answer]]:
        async with Load(served) as load:
            return served.kill_engine(victim), await load.answers()

    async def ask_all() -> None:
        for victim in VICTIMS:
            dead, answers = await ask(victim)
            assert answers == quiet
            end = f"{NAMES[victim]}: its engine (process {dead}) was killed by signal 9 (SIGKILL)"
            served.wait_for(end, seconds=10)

    asyncio.run(asyncio.wait_for(ask_all(), 300))
    for rank, url in enumerate(served.urls):
        assert get(f"{url}/ready")
        assert restarts(url) == before[rank] + VICTIMS.count(rank)
    if expert_library is not None:  # without the C++ library, all engines die together
        assert metric(served.urls[1], "failed_sequences_total") > 0
        assert metric(served.urls[1], "stalled_sequences") == 0
        log = (served.output.parent / "logs" / "beta.log").read_text()
        assert re.search("for experts of (alpha|gamma), which does not answer", log)
        assert re.search("no sequence waits for experts of (alpha|gamma)", log)


@pytest.mark.slow  # benchmarks/chaos.py stops engines in each CI run
def test_a_hung_engine_is_restarted(
    served: Served, quiet: list[Answer], expert_library: pathlib.Path | None
) -> None:
    before = [restarts(url) for url in served.urls]

    async def ask() -> list[Answer]:
        async with Load(served) as load:
            engine = served.engine(1)
            engine.suspend()
            answers = await load.answers()
            served.wait_for(f"beta: its engine (process {engine.pid}) failed: gave no sign of life")
            return answers

    assert asyncio.run(asyncio.wait_for(ask(), 120)) == quiet
    assert re.search("it was (in step [0-9]+|idle)", served.text)  # stopped in a step or between
    assert restarts(served.urls[1]) == before[1] + 1
    if expert_library is not None:
        assert restarts(served.urls[0]) == before[0]


@pytest.mark.slow  # benchmarks/chaos.py pauses processes in each CI run
def test_a_pause_of_a_process_costs_nothing_but_time(
    served: Served, quiet: list[Answer], tiny: Tiny, tmp_path: pathlib.Path
) -> None:
    """The launcher and a front end of a service pause, and the launcher of a batch."""
    line = {"prompt": "on and on", "max_tokens": 200}
    (tmp_path / "many.jsonl").write_text(f"{json.dumps(line)}\n" * 150)
    files = "--prompts", tmp_path / "many.jsonl", "--output", tmp_path / "out.jsonl"
    batch = Launch(tiny.command(*files), tmp_path)
    batch.wait_for(" | ")

    async def ask() -> list[Answer]:
        async with Load(served) as load:
            paused = batch.process, served.process, served.front(1)
            for process in paused:
                process.suspend()
            await asyncio.sleep(PAUSE_S)
            for process in paused:
                process.resume()
            return await load.answers()

    try:
        assert asyncio.run(asyncio.wait_for(ask(), 120)) == quiet
        assert batch.process.wait(60) == 0, batch.text
    finally:
        batch.kill()
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["index"] for answer in answers] == list(range(150))
    assert len({tuple(answer["token_ids"]) for answer in answers}) == 1
    assert not (tmp_path / "out.jsonl.partial").exists()
    batch.assert_nothing_left()


@pytest.mark.slow  # test_takeover.py ends services in this way
def test_a_signal_lets_servers_finish_what_runs(
    quiet: list[Answer], tiny: Tiny, tmp_path: pathlib.Path
) -> None:
    async def ask(cluster: Served) -> list[Answer]:
        async with Load(cluster, accepted=True) as load:
            cluster.process.send_signal(signal.SIGTERM)
            # Poll until each server has stopped listening.
            for rank in range(len(NAMES)):
                while accepts(cluster.port + rank):
                    await asyncio.sleep(0.02)
            return await load.answers()

    with serving(tiny, tmp_path) as ending:
        answers = asyncio.run(asyncio.wait_for(ask(ending), 120))
        assert ending.process.wait(30) == 0
        ending.assert_nothing_left()
        assert "all servers have drained" in ending.text
    assert answers == quiet


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_taken_port_is_said_before_anything_is_loaded(tiny: Tiny, tmp_path: pathlib.Path) -> None:
    port = free_ports(len(NAMES))
    with socket.create_server(("127.0.0.1", port + 1)):
        cluster = Launch(tiny.command("--port", str(port)), tmp_path)
        assert cluster.process.wait(60) == 2, cluster.text
    assert f"server beta: cannot listen on 127.0.0.1:{port + 1}" in cluster.text
    assert "--port" in cluster.text and "joining" not in cluster.text
    cluster.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launch", "front end"])
def test_engines_end_with_those_above_them(victim: str, tiny: Tiny, tmp_path: pathlib.Path) -> None:
    cluster = Served(tiny, tmp_path)
    for name in NAMES:
        cluster.wait_for(f"{name}: preparing")
    engines = [cluster.engine(rank) for rank in range(len(NAMES))]
    if victim == "launch":
        cluster.process.kill()
        cluster.process.wait(10)
    else:
        cluster.front(2).kill()
        assert cluster.process.wait(20) == 1
        end = f"server gamma (process {cluster.front(2).pid}) was killed by signal 9"
        assert end in cluster.text
    _, alive = psutil.wait_procs(engines, timeout=10)
    assert not alive
    cluster.assert_nothing_left()
