"""Tools, reasoning and structured outputs of chats, on a scripted queue."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from dance_jax.config import EngineConfig
from dance_jax.engine.sequence import Request
from dance_jax.serve.app import ServeInfo
from dance_jax.serve.parsers.formats import AnswerFormat
from tests.serve.scripted import HELLO, ScriptedQueue, client, error, events, serve_info, writes

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking %}<think>\n{% endif %}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
BODY = {"messages": HELLO, "tools": [WEATHER, CLOCK]}

Writing = Callable[[str], TestClient]


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> ServeInfo:
    """A model that thinks, and calls tools as Hermes does."""
    folder = tmp_path_factory.mktemp("thinking")
    info = serve_info(folder, engine_config=EngineConfig(max_model_len=1024))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = type(info.tokenizer).load(folder)
    return dataclasses.replace(
        info, tokenizer=tokenizer, answer_format=AnswerFormat("hermes", "think")
    )


def ask(info: ServeInfo, text: str, **fields: Any) -> tuple[dict[str, Any], Request]:
    """The only choice of an answer, and the request of the engine."""
    queue = ScriptedQueue(writes(text))
    answer = client(queue, info).post(CHAT, json={**BODY, **fields})
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    (request,) = queue.requests
    return choice, request


def test_parallel_calls_with_reasoning(thinking: ServeInfo) -> None:
    second = CALL.replace("weather", "clock").replace('{"city": "Bonn"}', "{}")
    text = f"<think>\nhm\n</think>\n\nLet me see.\n{CALL}\n{second}"
    choice, request = ask(thinking, text)
    message = choice["message"]
    assert (message["content"], message["reasoning_content"].strip()) == ("Let me see.", "hm")
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Bonn"}'},
        {"name": "clock", "arguments": "{}"},
    ]
    ids = [call["id"] for call in message["tool_calls"]]
    assert len({*ids}) == 2 and all(each.startswith("call_") for each in ids)
    assert choice["finish_reason"] == "tool_calls"
    assert request.prompt is not None and json.dumps(WEATHER)[:20] in request.prompt
    one, _ = ask(thinking, text, parallel_tool_calls=False)
    assert [call["function"]["name"] for call in one["message"]["tool_calls"]] == ["weather"]


def test_calls_alone_have_no_content(thinking: ServeInfo) -> None:
    choice, _ = ask(thinking, CALL)
    assert choice["message"]["content"] is None
    assert "reasoning_content" not in choice["message"]


def test_no_calls_without_tools_or_if_none_are_wanted(thinking: ServeInfo) -> None:
    for fields in ({"tools": None}, {"tools": []}, {"tool_choice": "none"}):
        choice, request = ask(thinking, CALL, **fields)
        assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"
        assert "weather" not in (request.prompt or "")


def test_a_stream_of_calls(thinking: ServeInfo) -> None:
    queue = ScriptedQueue(writes(f"<think>hm</think>Well.\n{CALL}"))
    answer = client(queue, thinking).post(CHAT, json={**BODY, "stream": True})
    stream = events(answer.text)
    deltas = [event["choices"][0]["delta"] for event in stream]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Well."
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "hm"
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert {*calls[0]} == {"index", "id", "type", "function"}
    assert calls[0]["function"]["name"] == "weather" and calls[0]["type"] == "function"
    assert all({*call} == {"index", "function"} and call["index"] == 0 for call in calls[1:])
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert json.loads(arguments) == {"city": "Bonn"} and len(calls) > 3
    assert stream[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_reasoning_can_be_left_out_and_begins_in_the_prompt(thinking: ServeInfo) -> None:
    on = {"chat_template_kwargs": {"enable_thinking": True}}
    choice, _ = ask(thinking, "hm</think>\n\nyes", **on)
    assert choice["message"]["reasoning_content"] == "hm"
    assert choice["message"]["content"] == "yes"
    choice, _ = ask(thinking, "hm</think>yes", reasoning_effort="low")
    assert choice["message"]["content"] == "yes"
    choice, _ = ask(thinking, "hm</think>yes", include_reasoning=False, **on)
    assert "reasoning_content" not in choice["message"]
    assert choice["message"]["content"] == "yes"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "clock"}}]
)
def test_a_call_that_must_come(thinking: ServeInfo, choice: Any) -> None:
    """The output is a JSON array of calls, once the model has thought."""
    text = '<think>hm</think>[{"name": "clock", "arguments": {"a": [1]}}]'
    found, request = ask(thinking, text, tool_choice=choice)
    (call,) = found["message"]["tool_calls"]
    assert call["function"] == {"name": "clock", "arguments": '{"a": [1]}'}
    assert found["finish_reason"] == "tool_calls" and found["message"]["content"] is None
    structure = request.params.structured_outputs
    assert structure is not None and structure.may_begin_with == ["<think>", "</think>"]
    assert ("weather" in (structure.grammar or "")) == (choice == "required")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required", "tools": None}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 7}}]}, "tools"),
    ],
)
def test_what_does_not_fit_together(thinking: ServeInfo, fields: Any, param: str) -> None:
    answer = client(ScriptedQueue(), thinking).post(CHAT, json={**BODY, **fields})
    found = error(answer, 400)
    assert (found["param"] or "").split(".")[0] == param, found


@pytest.mark.parametrize("special", [False, True])
def test_an_answer_with_a_structure_or_calls(thinking: ServeInfo, special: bool) -> None:
    """The grammar knows the marker of calls, which may be a special token."""
    form = AnswerFormat("hermes", None) if not special else AnswerFormat("mistral", None)
    info = dataclasses.replace(thinking, answer_format=form)
    if special:
        info.tokenizer._backend.add_special_tokens(["[TOOL_CALLS]"])
    choice, request = ask(info, '{"a": 1}', response_format={"type": "json_object"})
    assert choice["message"]["content"] == '{"a": 1}'
    structure = request.params.structured_outputs
    assert structure is not None
    begin = info.tokenizer.special_id("[TOOL_CALLS]") if special else "<tool_call>"
    assert structure.unless_begins_with == begin is not None
    structure.check()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "null"}, "strict": True},
                }
            },
            {"json": {"type": "null"}},
        ),
        ({"structured_outputs": {"json": {"type": "null"}}}, {"json": {"type": "null"}}),
        ({"structured_outputs": {"choice": ["a"], "regex": None}}, {"choice": ["a"]}),
        ({"guided_json": {"type": "null"}}, {"json": {"type": "null"}}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
    ],
)
def test_structures_reach_the_engine(
    http: TestClient, queue: ScriptedQueue, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    body = {"max_tokens": 1, **fields}
    for path, asked in ((CHAT, {"messages": HELLO}), ("/v1/completions", {"prompt": "a"})):
        answer = http.post(path, json={**asked, **body})
        assert answer.status_code == 200, answer.text
        structure = queue.requests[-1].params.structured_outputs
        assert structure is not None and structure.begins_after is None
        for name, value in expected.items():
            assert getattr(structure, name) == value
