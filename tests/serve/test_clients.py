"""What clients, browsers and proxies of the real world send, on a scripted queue."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec
import pytest
from fastapi.testclient import TestClient

from dance_jax.engine.sequence import SamplingParams
from dance_jax.launch.control.protocol import FrontSetup
from dance_jax.serve import delivery
from dance_jax.serve.app import ServeInfo
from dance_jax.serve.keys import Keys
from tests.serve.scripted import HELLO, MODEL, ScriptedQueue, client, error

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SAYS_NOTHING: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"skip_special_tokens": True, "include_stop_str_in_output": False}),
    (CHAT, {"prompt_logprobs": None, "chat_template_kwargs": {"enable_thinking": False}}),
    (CHAT, {"priority": 0, "cache_salt": "s", "continue_final_message": False}),
    (CHAT, {"add_special_tokens": False, "bad_words": [], "length_penalty": 1.0}),
    (CHAT, {"use_beam_search": False, "guided_json": None, "documents": None}),
    (CHAT, {"session_id": "x", "chat_id": "y"}),
    (CHAT, {"logprobs": False, "top_logprobs": 0}),
    (CHAT, {"tools": [], "tool_choice": "auto", "functions": None, "reasoning_effort": "none"}),
    (CHAT, {"max_tokens": 4.0, "seed": 42.0, "top_k": "5", "n": "1"}),
    (CHAT, {"something_new": None, "something_else": {}, "logit_bias": {}, "stop": []}),
    (COMPLETION, {"suffix": "", "response_format": None, "echo": False}),
    (COMPLETION, {"response_format": {"type": "text"}, "model": ""}),
]


@pytest.mark.parametrize(("path", "fields"), SAYS_NOTHING)
def test_what_says_nothing_is_accepted(
    http: TestClient, queue: ScriptedQueue, path: str, fields: dict[str, Any]
) -> None:
    asked = {"messages": HELLO} if path == CHAT else {"prompt": "hello"}
    answer = http.post(path, json={**asked, "max_tokens": 4, "seed": 42, "top_k": 5, **fields})
    assert answer.status_code == 200, answer.text
    (request,) = queue.requests
    assert (request.params.max_tokens, request.params.seed, request.params.top_k) == (4, 42, 5)


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{"name": "f"}]},
        {"priority": 3},
        {"use_beam_search": True},
        {"spaces_between_special_tokens": False},
        {"something_new": 1},
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(
    http: TestClient, fields: dict[str, Any]
) -> None:
    (name,) = fields
    found = error(http.post(CHAT, json={"messages": HELLO, **fields}), 400)
    assert found["param"] == name and "does not support it" in found["message"]


def test_odd_variables_of_templates(http: TestClient) -> None:
    for fields in ({"self": 5}, {"tools": 7, "bos_token": []}, {"names": {"a": "b"}}):
        body = {"messages": HELLO, "max_tokens": 1, "chat_template_kwargs": fields}
        assert http.post(CHAT, json=body).is_success
    body = {"messages": HELLO, "chat_template_kwargs": {"messages": []}}
    assert "cannot have messages" in error(http.post(CHAT, json=body), 400)["message"]


def test_defaults_arrive_as_they_are() -> None:
    """In the setup of a front end, which is JSON."""
    defaults = {"temperature": 0.6, "top_k": 20}
    kind = next(
        field.type for field in msgspec.structs.fields(FrontSetup) if field.name == "sampling"
    )
    found = msgspec.json.decode(msgspec.json.encode(defaults), type=kind)
    assert found == defaults and SamplingParams(**found).top_k == 20


def test_a_request_id_names_the_answer(http: TestClient, queue: ScriptedQueue) -> None:
    for path, asked, prefix in (
        (CHAT, {"messages": HELLO}, "chatcmpl-"),
        (COMPLETION, {"prompt": "a"}, "cmpl-"),
    ):
        for _ in range(2):  # the same twice, even at once
            answer = http.post(path, json={**asked, "max_tokens": 1, "request_id": "mine"})
            assert answer.json()["id"] == f"{prefix}mine"
    assert len({request.request_id for request in queue.requests}) == 4


def test_parts_of_messages(http: TestClient, queue: ScriptedQueue) -> None:
    cached = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [cached]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": None},
    ]
    assert http.post(CHAT, json={"messages": messages, "max_tokens": 1}).is_success
    assert queue.requests[0].prompt == "user: a\nassistant: no\nuser: \nassistant:"


def test_an_answer_that_goes_on(http: TestClient, queue: ScriptedQueue) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well, "}]
    body = {"messages": messages, "max_tokens": 1, "continue_final_message": True}
    assert http.post(CHAT, json=body).is_success
    assert queue.requests[0].prompt == "user: hello\nassistant: Well, "
    found = error(http.post(CHAT, json={**body, "add_generation_prompt": True}), 400)
    assert "leave out add_generation_prompt" in found["message"]


def test_half_of_a_surrogate_pair(http: TestClient) -> None:
    for text in (rb"\ud83d", rb"a\ude00b"):
        found = error(
            http.post(
                COMPLETION,
                content=b'{"prompt": "' + text + b'"}',
                headers={"Content-Type": "application/json"},
            ),
            400,
        )
        assert "half of a surrogate pair" in found["message"]


def test_pages_of_other_sites(info: ServeInfo) -> None:
    site = "https://chat.example.org"
    asks = {
        "Origin": site,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    guarded = dataclasses.replace(info, keys=Keys(["k"]))
    closed = client(ScriptedQueue(), guarded)
    assert "access-control-allow-origin" not in closed.options(CHAT, headers=asks).headers
    http = client(ScriptedQueue(), dataclasses.replace(guarded, allowed_origins=[site]))
    asked = http.options(CHAT, headers=asks)  # without a key
    assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == site
    assert asked.headers["access-control-allow-headers"] == "authorization,content-type"
    headers = {"Origin": site, "Authorization": "Bearer k"}
    answer = http.post(CHAT, json={"messages": HELLO, "max_tokens": 1}, headers=headers)
    assert answer.is_success and answer.headers["access-control-allow-origin"] == site
    other = http.get("/v1/models", headers={**headers, "Origin": "https://evil.example.org"})
    assert "access-control-allow-origin" not in other.headers


def test_supervisors_and_slashes(http: TestClient) -> None:
    head = http.head("/health")
    assert head.status_code == 200
    assert http.head("/v1/models").is_success and http.get("/ping").json() == {}
    assert set(http.get("/version").json()) == {"version"}
    for path in ("/v1/models/", "/health/"):
        assert http.get(path, follow_redirects=False).status_code == 200
    answer = http.post(f"{COMPLETION}/", json={"prompt": "a", "max_tokens": 1})
    assert answer.is_success
    found = error(http.post("/chat/completions", json={}), 404)
    assert found["message"].startswith("POST /chat/completions: no such path")
    assert error(http.get(CHAT), 405)["message"].startswith(f"GET {CHAT}: ")


def test_several_names_and_keys(info: ServeInfo) -> None:
    keys = Keys(["one", "two"])
    http = client(ScriptedQueue(), dataclasses.replace(info, models=["big", "gpt-4"], keys=keys))

    def ask(model: str, key: str) -> Any:
        body = {"model": model, "prompt": "a", "max_tokens": 1}
        return http.post(COMPLETION, json=body, headers={"Authorization": f"Bearer {key}"})

    for model in ("big", "gpt-4", ""):
        for key in ("one", "two"):
            assert ask(model, key).json()["model"] == "big"
    assert "serves 'big' or 'gpt-4'" in error(ask(MODEL, "one"), 404)["message"]
    models = http.get("/v1/models", headers={"Authorization": "Bearer two"}).json()["data"]
    assert [card["id"] for card in models] == ["big", "gpt-4"]
    keys.change(["three"])
    error(ask("big", "one"), 401)
    assert ask("big", "three").is_success


def test_one_key_does_not_make_one_client() -> None:
    assert Keys().number(b"") == Keys(["k"]).number(b"Bearer k") == -1
    assert Keys(["a", "k"]).number(b"bearer k") == 1
    assert Keys(["a", "k"]).number(b"Bearer b") is Keys(["k"]).number(b"k") is None


def test_a_stream_that_waits_has_comments(info: ServeInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first token and between two."""
    monkeypatch.setattr(delivery, "COMMENT_S", 0.05)
    monkeypatch.setattr(delivery, "_LOOK_S", 0.02)
    queue = SlowQueue(0.3)
    body = {"prompt": "a", "max_tokens": 2, "stream": True}
    text = client(queue, info).post(COMPLETION, json=body).text
    lines = [line for line in text.split("\n\n") if line]
    begins = [line.partition(" ")[0] for line in lines]
    assert begins[0] == ":" and begins[-1] == "data:"
    first = begins.index("data:")
    assert ":" in begins[first:]
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines if '"text"' in line]
    assert texts == ["a", "b"]


class SlowQueue(ScriptedQueue):
    """Its deltas come one after the other, each after a pause.

    Args:
        pause_s: in seconds.
    """

    def __init__(self, pause_s: float) -> None:
        super().__init__()
        self._pause_s = pause_s

    def submit(self, request: Any, unread: Any) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        self.requests.append(request)
        deltas = [*self._script(request), None]
        for number, delta in enumerate(deltas, 1):
            loop.call_later(number * self._pause_s, unread.put_nowait, delta)
