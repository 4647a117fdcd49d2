"""Responses of the HTTP API, on a scripted queue."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fastapi.testclient import TestClient

from dance_jax.engine.sequence import Logprob, OutputDelta
from dance_jax.serve.app import ServeInfo
from tests.serve.scripted import (
    CONTEXT,
    HELLO,
    MODEL,
    ScriptedQueue,
    client,
    error,
    events,
)


def complete(http: TestClient, **fields: Any) -> Any:
    answer = http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 3, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(http: TestClient, **fields: Any) -> Any:
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 3, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_completion(http: TestClient, queue: ScriptedQueue) -> None:
    answer = complete(http, model=MODEL, seed=7, temperature=0.5, stop="x")
    (choice,) = answer["choices"]
    assert choice["text"] == "abc" and choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert answer["object"] == "text_completion" and answer["model"] == MODEL
    (request,) = queue.requests
    assert request.request_id.startswith(answer["id"])
    assert (request.prompt, len(request.prompt_token_ids)) == ("hi", 2)
    params = request.params
    assert (params.seed, params.temperature, params.stop_strings) == (7, 0.5, ["x"])
    assert queue.closed == [request.request_id]


def test_what_is_left_out_or_null_is_default(http: TestClient, queue: ScriptedQueue) -> None:
    for fields in ({}, {"temperature": None, "max_tokens": None, "stop": None, "user": "me"}):
        assert http.post("/v1/completions", json={"prompt": "hi", **fields}).status_code == 200
    first, second = queue.requests
    assert first.params == second.params
    assert (first.params.max_tokens, first.params.temperature, first.params.n) == (16, 1.0, 1)


def test_what_is_left_out_is_the_models_default(info: ServeInfo) -> None:
    queue = ScriptedQueue()
    defaults = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "max_tokens": 9}
    http = client(queue, dataclasses.replace(info, sampling=defaults))
    assert http.post("/v1/completions", json={"prompt": "hi", "top_k": None}).is_success
    assert http.post("/v1/chat/completions", json={"messages": HELLO}).is_success
    chat(http, temperature=0, top_k=0, repetition_penalty=1)
    said = [
        (each.params.temperature, each.params.top_k, each.params.repetition_penalty)
        for each in queue.requests
    ]
    assert said == [(0.6, 20, 1.1), (0.6, 20, 1.1), (0.0, 0, 1.0)]
    # A completion has OpenAI's own default.
    assert [each.params.max_tokens for each in queue.requests] == [16, 9, 3]


def test_all_forms_of_prompts(http: TestClient, queue: ScriptedQueue, info: ServeInfo) -> None:
    ids = info.tokenizer.encode("hi")
    for prompt, count in [("hi", 1), (["hi", "hi"], 2), (ids, 1), ([ids, ids, ids], 3)]:
        answer = complete(http, prompt=prompt, n=2)
        assert [choice["index"] for choice in answer["choices"]] == list(range(2 * count))
        assert {choice["text"] for choice in answer["choices"]} == {"abc"}
        assert answer["usage"]["prompt_tokens"] == 2 * count
        assert answer["usage"]["completion_tokens"] == 6 * count
        sent, queue.requests = queue.requests, []
        assert [request.prompt_token_ids for request in sent] == [ids] * count
        assert len({request.request_id for request in sent}) == count


def test_echo(http: TestClient, info: ServeInfo) -> None:
    prompts = [info.tokenizer.encode("hi"), info.tokenizer.encode("ho")]
    texts = [choice["text"] for choice in complete(http, prompt=prompts, echo=True)["choices"]]
    assert texts == ["hiabc", "hoabc"]
    answer = http.post(
        "/v1/completions", json={"prompt": "hi", "max_tokens": 2, "echo": True, "stream": True}
    )
    assert [chunk["choices"][0]["text"] for chunk in events(answer.text)] == ["hia", "b"]


def test_all_parameters_reach_the_engine(http: TestClient, queue: ScriptedQueue) -> None:
    fields = {
        "temperature": 0.9,
        "top_p": 0.8,
        "top_k": 7,
        "min_p": 0.01,
        "seed": 2**63 - 1,
        "stop": ["x", "y"],
        "stop_token_ids": [5],
        "max_tokens": 9,
        "min_tokens": 2,
        "ignore_eos": True,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 2,
    }
    complete(http, **fields, logit_bias={"7": -100, "9": 0.5}, n=3, best_of=3, logprobs=4)
    params = queue.requests[0].params
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.n, params.logprobs, params.logit_bias) == (3, 4, {7: -100.0, 9: 0.5})


def test_logprobs_of_completions(http: TestClient) -> None:
    logprobs = complete(http, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c"]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["top_logprobs"][1] == {"b": -0.5, "c": -1.5}


def test_tokens_without_a_text_have_a_name_of_their_own(info: ServeInfo) -> None:
    def script(request: Any) -> Any:
        found = {
            9: Logprob(-math.inf, 3, "\ufffd"),
            8: Logprob(-0.1, 1, "\ufffd"),
            1: Logprob(-0.2, 2, ""),
        }
        yield OutputDelta(
            request.request_id, 0, token_ids=[9], logprobs=[found], finish_reason="length"
        )

    http = client(ScriptedQueue(script), info)
    logprobs = complete(http, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:9"]
    names = {"token_id:9": -9999.0, "token_id:8": -0.1, "token_id:1": -0.2}
    assert logprobs["top_logprobs"] == [names]
    (entry,) = chat(http, logprobs=True, top_logprobs=1)["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("token_id:9", -9999.0, None)
    assert [top["token"] for top in entry["top_logprobs"]] == ["token_id:8"]


def test_a_stream_of_completions(http: TestClient) -> None:
    body = {"prompt": ["hi", "ho"], "max_tokens": 3, "n": 2, "stream": True}
    body["stream_options"] = {"include_usage": True}
    answer = http.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, usage = events(answer.text)
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}
    texts: dict[int, str] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        assert (choice["finish_reason"] == "length") == (texts[choice["index"]] == "abc")
        assert chunk["usage"] is None and chunk["id"] == usage["id"]
    assert texts == dict.fromkeys(range(4), "abc")


def test_a_chat(http: TestClient, queue: ScriptedQueue) -> None:
    answer = chat(http)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "abc"}
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert answer["object"] == "chat.completion"
    prompt = "user: hello\nassistant:"
    assert queue.requests[0].prompt == prompt
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_a_chat_may_fill_the_context(http: TestClient, queue: ScriptedQueue) -> None:
    for fields in ({}, {"max_tokens": 4}, {"max_completion_tokens": 5}):
        assert http.post("/v1/chat/completions", json={"messages": HELLO, **fields}).is_success
    assert [request.params.max_tokens for request in queue.requests] == [None, 4, 5]


def test_messages_reach_the_template(http: TestClient, queue: ScriptedQueue) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        {"role": "system", "content": parts, "name": "n"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    chat(http, messages=messages, add_generation_prompt=False)
    assert queue.requests[0].prompt == "system: one\ntwo\nassistant: \ntool: 3\n"


def test_what_changes_nothing_is_accepted(http: TestClient) -> None:
    harmless = {"response_format": {"type": "text"}, "user": "me", "store": False, "tools": None}
    plain = chat(http)["choices"]
    more = {"metadata": {"a": "b"}, "service_tier": "auto", "modalities": ["text"]}
    assert chat(http, **harmless, **more)["choices"] == plain


def test_a_stream_of_a_chat(http: TestClient) -> None:
    body = {"messages": HELLO, "max_tokens": 2, "n": 2, "stream": True, "logprobs": True}
    body |= {"top_logprobs": 2, "stream_options": {"include_usage": True}}
    *chunks, usage = events(http.post("/v1/chat/completions", json=body).text)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 4
    for index in range(2):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        deltas = [choice["delta"] for choice in mine]
        assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}]
        assert [choice["finish_reason"] for choice in mine] == [None, None, "length"]
        (entry,) = mine[2]["logprobs"]["content"]
        assert (entry["token"], entry["bytes"], entry["logprob"]) == ("b", [98], -0.5)
        assert [top["token"] for top in entry["top_logprobs"]] == ["b", "c"]


def test_models(http: TestClient) -> None:
    (card,) = http.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == (MODEL, CONTEXT)
    assert http.get(f"/v1/models/{MODEL}").json() == card


def test_tokens(http: TestClient, info: ServeInfo) -> None:
    text = "two words"
    ids = info.tokenizer.encode(text)
    answer = http.post("/tokenize", json={"prompt": text}).json()
    assert answer == {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids}
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    for prompt, expected in ((True, "user: hello\nassistant:"), (False, "user: hello\n")):
        body = {"messages": HELLO, "add_generation_prompt": prompt}
        found = http.post("/tokenize", json=body).json()["tokens"]
        assert found == info.tokenizer.encode(expected)
    for body in ({}, {"prompt": "a", "messages": HELLO}, {"prompt": 5}):
        assert error(http.post("/tokenize", json=body), 400)["param"] == "prompt"
    assert error(http.post("/detokenize", json={"tokens": [260]}), 400)["param"] == "tokens"
    assert error(http.post("/detokenize", json={"tokens": [-1]}), 400)["param"] == "tokens[0]"
    assert error(http.post("/tokenize", json={"messages": []}), 400)["param"] == "messages"


def test_state(http: TestClient, queue: ScriptedQueue) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/ready").json() == {"ready": True}
    queue.ready = False
    answer = http.get("/ready")
    assert (answer.status_code, answer.json()) == (503, {"ready": False})
    assert http.get("/health").status_code == 200


def test_placement(http: TestClient) -> None:
    answer = http.get("/placement").json()
    assert answer["version"] == 1
    first, second = answer["servers"]
    assert (first["name"], second["name"]) == ("alpha", "beta")
    assert first["resident"] == [list(range(10))] * 2
    assert second["resident"] == [list(range(8, 16))] * 2
