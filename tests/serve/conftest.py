"""One cluster and one local server for the whole session; the HTTP API on a scripted queue."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator

import pytest
from fastapi.testclient import TestClient

from dance_jax.config import EngineConfig
from dance_jax.engine.sequence import OutputDelta, Request
from dance_jax.serve.app import ServeInfo
from dance_jax.serve.parsers.formats import AnswerFormat
from tests.launch.cold_run import Tiny, cold_run
from tests.serve.local_server import TEMPLATE, HttpThread, LocalServer, local_server, stopping
from tests.serve.scripted import ScriptedQueue, application, client, serve_info, writes
from tests.serve.served import Served, serving


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, expert_library: pathlib.Path | None) -> Tiny:
    return cold_run(tmp_path_factory, expert_library)


@pytest.fixture(scope="session")
def served(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three local servers with a tiny model; tests may kill engines, but not front ends."""
    folder = tmp_path_factory.mktemp("served")
    with serving(tiny, folder, "--log-dir", folder / "logs") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, expert_library: object
) -> Iterator[LocalServer]:
    """A server with a tiny model in this process."""
    with local_server(tmp_path_factory.mktemp("local")) as running:
        yield running


@pytest.fixture(scope="session")
def weather_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose scripted model thinks, calls "weather", and tells what that says."""
    folder = tmp_path_factory.mktemp("weather")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    how = {
        "engine_config": EngineConfig(max_model_len=1024),
        "answer_format": AnswerFormat("hermes", "think"),
    }
    app = application(ScriptedQueue(_asks_for_the_weather), serve_info(folder, **how))
    with stopping(HttpThread(app)) as running:
        yield running.url


def _asks_for_the_weather(request: Request) -> Iterable[OutputDelta]:
    _, told, report = (request.prompt or "").rpartition("tool: ")
    if told:
        return writes(f"<think>good</think>It is {report.splitlines()[0]}.")(request)
    call = '{"name": "weather", "arguments": {"city": "Bonn"}}'
    return writes(f"<think>hm</think>Let me see.\n<tool_call>\n{call}\n</tool_call>")(request)


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ServeInfo:
    return serve_info(tmp_path_factory.mktemp("model"))


@pytest.fixture
def queue() -> ScriptedQueue:
    return ScriptedQueue()


@pytest.fixture
def http(queue: ScriptedQueue, info: ServeInfo) -> TestClient:
    return client(queue, info)
