"""Error responses of the HTTP API, on a scripted queue."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pathlib
from typing import Any

import pytest
from fastapi.testclient import TestClient

from dance_jax.config import UserError
from dance_jax.engine.sequence import OutputDelta
from dance_jax.serve import errors
from dance_jax.serve.app import ServeInfo
from dance_jax.serve.bodies import MAX_BODY, MAX_TOKEN_IDS
from dance_jax.serve.keys import Keys
from dance_jax.serve.queue import QueueFull, Unavailable
from tests.serve.scripted import (
    CONTEXT,
    HELLO,
    ScriptedQueue,
    application,
    client,
    error,
    events,
    serve_info,
)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": ["a", 7]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [260]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [2**70]}, "prompt[0]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 64, "n": 3}, "n"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": "two"}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": "all"}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"min_tokens": 4}, "min_tokens"),
        ({"allowed_token_ids": [260]}, "allowed_token_ids"),
        ({"bad_words": ["  "]}, "bad_words[0]"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"guided_regex": "a("}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"type": "thing"}}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"stop_token_ids": [260]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
        ({"logit_bias": {"260": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more"),
        ({"stream": 5}, "stream"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_wrong_fields_of_completions(
    http: TestClient, queue: ScriptedQueue, fields: dict[str, Any], param: str | None
) -> None:
    body = {"prompt": "hi", "max_tokens": 3, **fields}
    found = error(http.post("/v1/completions", json=body), 400)
    assert found["param"] == param, found
    assert found["type"] == "invalid_request_error"
    assert queue.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"prompt": "hi"}, "prompt"),
    ],
)
def test_wrong_fields_of_chats(
    http: TestClient, queue: ScriptedQueue, fields: dict[str, Any], param: str
) -> None:
    found = error(http.post("/v1/chat/completions", json={"messages": HELLO, **fields}), 400)
    assert found["param"] == param, found
    assert queue.requests == []


def test_what_is_unsupported_says_so(http: TestClient) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a", "suffix": "b"})
    assert "does not support" in error(answer, 400)["message"]


def test_a_template_that_needs_too_much(tmp_path: pathlib.Path) -> None:
    info = serve_info(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    bomb = "{{ 'a' * 10 ** 10 }}"
    template = (
        "{% if messages[0].content == 'bomb' %}" + bomb + "{% endif %}{{ messages[0].content }}"
    )
    config.write_text(json.dumps(settings | {"chat_template": template}))
    http = client(
        ScriptedQueue(), dataclasses.replace(info, tokenizer=info.tokenizer.load(tmp_path))
    )
    messages = [{"role": "user", "content": "bomb"}]
    found = error(http.post("/v1/chat/completions", json={"messages": messages}), 400)
    assert found["param"] == "messages" and "needs more than 512 MiB" in found["message"]
    assert http.post("/v1/chat/completions", json={"messages": HELLO}).is_success
    config.write_text(json.dumps(settings | {"chat_template": bomb}))
    tokenizer = info.tokenizer.load(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer_config.json: chat template: .* correct the"):
        client(ScriptedQueue(), dataclasses.replace(info, tokenizer=tokenizer))


def test_a_template_that_refuses(tmp_path: pathlib.Path) -> None:
    info = serve_info(tmp_path)
    queue = ScriptedQueue()
    config = tmp_path / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    for template in (
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ range(10 ** 9) }}",
        "{{ messages[0]['content'] + 1 }}",
        None,
    ):
        config.write_text(json.dumps(settings | {"chat_template": template}))
        changed = info.tokenizer.load(tmp_path)
        http = client(queue, dataclasses.replace(info, tokenizer=changed))
        found = error(http.post("/v1/chat/completions", json={"messages": HELLO}), 400)
        assert found["param"] == "messages" and "template" in found["message"]
        assert str(tmp_path) not in found["message"]
    assert queue.requests == []


def test_too_long_for_the_context(http: TestClient, queue: ScriptedQueue) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "x" * CONTEXT}),
        ("/v1/completions", {"prompt": "x" * 100_000}),
        ("/v1/completions", {"prompt": [5] * CONTEXT}),
        ("/v1/completions", {"prompt": "x" * (CONTEXT - 5), "max_tokens": 6}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * CONTEXT}]}),
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": CONTEXT - 1}),
        ("/v1/chat/completions", {"messages": HELLO, "max_completion_tokens": CONTEXT - 1}),
    ):
        found = error(http.post(path, json=body), 400)
        assert found["code"] == "context_length_exceeded"
        assert str(CONTEXT) in found["message"]
        assert found["message"].startswith(found["param"])
        assert found["param"] in body
    assert queue.requests == []
    # The engine cuts the default max_tokens to the room left in the context.
    assert http.post("/v1/completions", json={"prompt": "x" * (CONTEXT - 5)}).is_success
    assert http.post(
        "/v1/completions", json={"prompt": "x" * (CONTEXT - 5), "max_tokens": 5}
    ).is_success
    assert [request.params.max_tokens for request in queue.requests] == [16, 5]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_what_is_no_request(http: TestClient, queue: ScriptedQueue, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
        error(answer, 400)
    assert queue.requests == []


def test_other_types_of_bodies(http: TestClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""):
        answer = http.post(
            "/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": kind}
        )
        assert "application/json" in error(answer, 415)["message"]
    answer = http.post(
        "/v1/completions",
        content=b'{"prompt": "a"}',
        headers={"Content-Type": "application/json; charset=utf-8"},
    )
    assert answer.is_success


def test_bodies_are_bounded(http: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    error(http.post("/v1/completions", content=b" " * (MAX_BODY + 1), headers=headers), 413)
    length = headers | {"Content-Length": str(MAX_BODY + 1)}
    error(http.post("/v1/completions", content=b"{}", headers=length), 413)
    body = b'{"prompt": "a"}'
    body += b" " * (MAX_BODY - len(body))
    assert http.post("/v1/completions", content=body, headers=headers).is_success


def test_bodies_without_a_length_are_bounded_too(queue: ScriptedQueue, info: ServeInfo) -> None:
    received, sent = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal received
        received += 1 << 16
        return {"type": "http.request", "body": b" " * (1 << 16), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    asyncio.run(application(queue, info)(scope, receive, send))
    assert sent[0]["status"] == 413
    assert MAX_BODY < received <= MAX_BODY + (1 << 16)


def test_unknown_models_routes_and_methods(http: TestClient) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a", "model": "other"}),
        ("/v1/chat/completions", {"messages": HELLO, "model": "other"}),
        ("/tokenize", {"prompt": "a", "model": "other"}),
        ("/detokenize", {"tokens": [], "model": "other"}),
    ):
        found = error(http.post(path, json=body), 404)
        assert (found["param"], found["code"]) == ("model", "model_not_found")
    assert error(http.get("/v1/models/a/b"), 404)["code"] == "model_not_found"
    for path in ("/", "/v1", "/docs", "/v1/embeddings"):
        error(http.get(path), 404)
    answer = http.get("/v1/completions")
    error(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_a_queue_that_takes_no_more(info: ServeInfo) -> None:
    full, starting = QueueFull("7 wait"), Unavailable("the server is starting")
    full.retry_after_s, starting.retry_after_s = 2.3, 0.01
    for refusal, status, wait in ((full, 429, "3"), (starting, 503, "1")):
        for stream in (False, True):
            queue = ScriptedQueue(refusal=refusal, accepted=2)
            http = client(queue, info)
            body = {"prompt": ["a", "b", "c"], "stream": stream}
            answer = http.post("/v1/completions", json=body)
            assert error(answer, status)["message"].startswith(str(refusal))
            assert answer.headers["retry-after"] == wait
            # If one prompt of a call is refused, none of them runs.
            assert sorted(queue.closed) == sorted(request.request_id for request in queue.requests)
            assert len(queue.closed) == 2


def test_an_engine_that_fails(info: ServeInfo) -> None:
    def script(request: Any) -> Any:
        yield OutputDelta(request.request_id, 0, text="so", token_ids=[5])
        yield OutputDelta(request.request_id, 0, finish_reason=reason, stop_reason="poison")

    reason: Any
    for reason, status in (("error", 500), ("abort", 503)):
        queue = ScriptedQueue(script)
        http = client(queue, info)
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": HELLO}),
        ):
            message = error(http.post(path, json=body), status)["message"]
            assert ("poison" in message) == (reason == "error")
            *chunks, last = events(http.post(path, json=body | {"stream": True}).text)
            assert chunks[-1]["choices"][0]["index"] == 0
            assert last["error"]["message"] == message
        assert len(queue.closed) == 4


def test_a_failure_before_the_first_token_has_a_status(info: ServeInfo) -> None:
    """Also in a stream: proxies repeat calls that fail with 503 on another server."""

    def script(request: Any) -> Any:
        yield OutputDelta(request.request_id, 0, finish_reason="abort")

    queue = ScriptedQueue(script)
    error(client(queue, info).post("/v1/completions", json={"prompt": "a", "stream": True}), 503)
    assert len(queue.closed) == 1


def test_a_bug_shows_nothing_of_the_inside(info: ServeInfo) -> None:
    http = client(ScriptedQueue(refusal=RuntimeError("secret")), info)
    found = error(http.post("/v1/completions", json={"prompt": "a"}), 500)
    assert found["type"] == "server_error" and "secret" not in found["message"]


def test_a_bug_in_a_stream_is_an_error_event(info: ServeInfo) -> None:
    def script(request: Any) -> Any:
        yield OutputDelta(request.request_id, 0, text="so", token_ids=[5])
        yield OutputDelta(request.request_id, 0, text="secret", token_ids=[5], logprobs=[{}])

    queue = ScriptedQueue(script)
    body = {"prompt": "a", "stream": True, "logprobs": 1}
    *_, last = events(client(queue, info).post("/v1/completions", json=body).text)
    assert last["error"]["type"] == "server_error" and "secret" not in last["error"]["message"]
    assert len(queue.closed) == 1


def test_the_key(info: ServeInfo) -> None:
    http = client(ScriptedQueue(), dataclasses.replace(info, keys=Keys(["sésame", "zwei"])))
    right: Any = {"Authorization": "Bearer sésame".encode()}
    wrong: list[Any] = [
        {},
        {"Authorization": "Bearer sesame"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic sésame".encode()},
    ]
    for path in ("/health", "/ready", "/metrics"):
        assert http.get(path).is_success
    for path in ("/v1/models", "/placement", "/openapi.json", "/nowhere"):
        for headers in wrong:
            answer = http.get(path, headers=headers)
            assert error(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    assert http.get("/v1/models", headers=right).is_success
    body = {"prompt": "a", "max_tokens": 1}
    error(http.post("/v1/completions", json=body), 401)
    error(http.post("/v1/completions", content=b" " * (MAX_BODY + 1)), 401)
    assert http.post("/v1/completions", json=body, headers=right).is_success


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/chat/completions", "messages", [1] * 500_000),
        ("/v1/chat/completions", "messages", [{}] * 500_000),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": [1] * 500_000}]),
        ("/v1/completions", "prompt", [[1]] + [[]] * 500_000),
        ("/v1/completions", "prompt", [1] * (MAX_TOKEN_IDS + 1)),
        ("/v1/completions", "logit_bias", {f"x{n}": 1 for n in range(100_000)}),
        ("/v1/completions", "stop", [[["a"]] * 1000] * 10),
        ("/detokenize", "tokens", [1] * 1_000_000),
    ],
)
def test_large_bodies_are_not_looked_at_entry_by_entry(
    http: TestClient, path: str, field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    monkeypatch.setattr(errors, "_first_wrong_field", looked.append)
    found = error(http.post(path, json={field: value}), 400)
    assert found["param"] == field and "too many entries" in found["message"]
    assert not looked


def test_names_are_shown_in_part(http: TestClient) -> None:
    found = error(http.post("/v1/completions", json={"prompt": "a", "z" * 1_000_000: 1}), 400)
    assert len(found["param"]) == 80 and len(found["message"]) < 300
