"""What feeds the dashboard; tests/page has the page itself, in a browser."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from fastapi.testclient import TestClient

from dance_jax.launch.control import protocol
from dance_jax.serve import view
from dance_jax.serve.app import ServeInfo, create_app
from dance_jax.serve.keys import Keys
from dance_jax.serve.view import Views
from tests.serve.scripted import ScriptedQueue, client, deciding, error
from tests.serve.served import MODEL, NAMES, Served

KEYED = {"Authorization": "Bearer secret"}


class Other:
    """Stands in for launcher and engine, and keeps what they are told."""

    def __init__(self, queue: ScriptedQueue, info: ServeInfo) -> None:
        self.told: list[Any] = []
        self.commands: list[Any] = []
        self.experts = deciding()
        self.views = Views(
            queue,  # pyright: ignore[reportArgumentType]
            info,
            self.experts,
            None,
            self.told.append,
            self.commands.append,
        )
        app = create_app(queue, info, self.experts, views=self.views)  # pyright: ignore
        self.http = TestClient(app, raise_server_exceptions=False)


def test_the_pages_files_need_no_key_and_nothing_else_is_served(
    queue: ScriptedQueue, info: ServeInfo
) -> None:
    http = client(queue, dataclasses.replace(info, keys=Keys(["secret"])))
    assert http.get("/dashboard", follow_redirects=False).headers["location"] == "dashboard/"
    page = http.get("/dashboard/")
    assert page.is_success and page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    script = http.get("/dashboard/main.js")
    assert script.is_success and script.headers["content-type"].startswith("text/javascript")
    for path in ("nothing.js", "../view.py", "..%2fview.py", "vendor"):
        assert http.get(f"/dashboard/{path}").status_code in (401, 404)
    for path in ("/events", "/placement"):
        assert error(http.get(path), 401)
    assert error(http.post("/trace", json={}), 401)


def test_views_are_made_only_while_somebody_watches(
    queue: ScriptedQueue, info: ServeInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "VIEW_S", 0.02)
    other = Other(queue, info)
    shown = view.View("beta", 1.0, running=3)
    packed = msgspec.msgpack.encode(shown)
    fault = "its engine ended", 7.0
    other.views.viewed(protocol.Viewed(1, packed, "http://beta", *fault))

    async def watch() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(2):  # a viewer that comes after all have left waits, as the first did
            events = other.views.events()
            async for name, data in events:
                found[name] = json.loads(data)
                if name == "views":
                    break
            await events.aclose()
            await asyncio.sleep(0.1)
        return found

    found = asyncio.run(watch())
    placement = found["placement"]
    assert (placement["you"], placement["layers"], placement["experts"]) == ("alpha", 2, 16)
    bits = np.frombuffer(base64.b64decode(placement["servers"][1]["resident"][0]), np.uint8)
    assert np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist() == [*range(8, 16)]
    alpha, beta = found["views"]["servers"]
    assert alpha["alive"] and alpha["in_flight"] == 0
    assert (beta["url"], beta["fault"], beta["fault_time"]) == ("http://beta", *fault)
    assert beta["running"] == 3
    asked = len(other.told)
    assert 0 < asked < 9 and {type(event) for event in other.told} == {protocol.Watching}
    assert {type(command) for command in other.commands} == {protocol.Watched}


def test_pages_of_other_servers_may_call_this_one(queue: ScriptedQueue, info: ServeInfo) -> None:
    other = Other(queue, dataclasses.replace(info, allowed_origins=[]))
    other.views.asked(1, "http://127.0.0.1:8001")
    other.views.asked(1, "http://localhost:8002")
    other.views.asked(1, "")
    (told, *_) = other.told
    assert told.watcher == 1 and msgspec.msgpack.decode(told.view)["name"] == "alpha"
    allowed = {f"{host}:{port}" for host in ("127.0.0.1", "localhost") for port in (8001, 8002)}
    for origin in (*allowed, "beta", "127.0.0.1:8003"):
        answer = other.http.get("/health", headers={"Origin": f"http://{origin}"})
        assert ("access-control-allow-origin" in answer.headers) == (origin in allowed)


def test_a_waterfall_that_does_not_come(
    queue: ScriptedQueue, info: ServeInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "WATERFALL_S", 0.05)
    other = Other(queue, info)
    assert "no token" in error(other.http.post("/trace", json={}), 409)["message"]
    assert other.commands == [protocol.AskWaterfall(1, 4)]
    assert error(other.http.post("/trace", json={"tokens": 99}), 400)["param"] == "tokens"

    def refuse(command: Any) -> None:
        other.views.answered(command.id, protocol.Waterfall(command.id, [], "it is traced"))

    other.views._to_engine = refuse
    assert "it is traced" in error(other.http.post("/trace", json={}), 409)["message"]
    queue.running = False
    assert "is starting" in error(other.http.post("/trace", json={}), 503)["message"]


def test_draining_needs_a_key(queue: ScriptedQueue, info: ServeInfo) -> None:
    assert "--api-key" in error(client(queue, info).post("/servers/beta/drain"), 403)["message"]
    other = Other(queue, dataclasses.replace(info, keys=Keys(["secret"])))
    assert error(other.http.post("/servers/beta/drain"), 401)
    assert error(other.http.post("/servers/delta/drain", headers=KEYED), 404)
    whys = ["", "it is the only server"]

    def answer(event: Any) -> None:
        assert event.name == "beta"
        other.views.answered(event.id, protocol.DrainAnswered(event.id, whys.pop(0)))

    other.views._tell = answer
    assert "leaves" in other.http.post("/servers/beta/drain", headers=KEYED).json()["text"]
    refused = error(other.http.post("/servers/beta/drain", headers=KEYED), 400)
    assert "only server" in refused["message"]


def test_three_servers_show_what_they_do(served: Served) -> None:
    """The launcher brings the views of all servers to the one at which somebody watches."""
    ask = {"model": MODEL, "prompt": "Es war", "max_tokens": 200, "ignore_eos": True}

    async def watch() -> tuple[dict[str, Any], Any, list[Any]]:
        async with httpx.AsyncClient(base_url=served.urls[1], timeout=60) as http:
            answers = [
                asyncio.create_task(http.post(f"{url}/v1/completions", json=ask))
                for url in served.urls
            ]
            traced = asyncio.create_task(http.post("/trace", json={"tokens": 3}))
            found: dict[str, Any] = {}
            async with http.stream("GET", "/events") as stream:
                async for line in stream.aiter_lines():
                    if line.startswith("event: "):
                        name = line.removeprefix("event: ")
                    elif line.startswith("data: "):
                        found[name] = json.loads(line.removeprefix("data: "))
                        if (
                            all(answer.done() for answer in answers)
                            and len(found) > 1
                            and all(
                                server["steps"] > 150 and server["counts"]
                                for server in found["views"]["servers"]
                            )
                        ):
                            break
            return found, (await traced).json()["steps"], [(await one).json() for one in answers]

    found, steps, _ = asyncio.run(asyncio.wait_for(watch(), 60))
    servers = found["views"]["servers"]
    assert [server["name"] for server in servers] == [*NAMES] and found["placement"][
        "you"
    ] == "beta"
    layers, experts = found["placement"]["layers"], found["placement"]["experts"]
    for server, url in zip(servers, served.urls, strict=True):
        assert server["url"] == url and server["alive"] and server["age"] < 5
        counts = np.frombuffer(base64.b64decode(server["counts"]), np.uint32)
        assert counts.size == layers * experts and counts.sum() > 0
        assert server["calls_local"] + server["calls_remote"] == counts.sum()
        assert min(server["memory"].values()) >= 0 and server["memory"]["experts"] > 0
        assert {link["peer"] for link in server["links"]} == {*NAMES} - {server["name"]}
        assert all(link["sent"] > 0 and link["calls"] > 0 for link in server["links"])
        assert 0 < server["itl"][0] <= server["itl"][1]
    assert len(steps) == 3
    for step in steps:
        assert len(step["layers"]) == layers and len(step["requests"]) == 1
        assert {part["name"] for part in step["parts"]} == {"schedule", "computing", "output"}
        for call in step["calls"]:
            times = [
                call[name] for name in ("begin", "arrived", "compute_begin", "compute_end", "end")
            ]
            assert times == sorted(times) and call["peer"] in NAMES
