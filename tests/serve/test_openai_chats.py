"""OpenAI's client asks for tool calls and for structured answers, from a real engine."""

from __future__ import annotations

import asyncio
import enum
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Optional

import openai
import pytest
from pydantic import BaseModel, Field

from tests.serve.local_server import MODEL, LocalServer

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Address(BaseModel):
    street: Annotated[str, Field(max_length=8)]
    number: Annotated[int, Field(ge=0, le=999)]


class Person(BaseModel):
    """Somebody"""

    name: Annotated[str, Field(max_length=8)]
    mood: Mood
    nickname: Optional[Annotated[str, Field(max_length=5)]]  # noqa: UP045
    home: Address | None
    others: Annotated[list[Address], Field(max_length=2)]


class Forecast(BaseModel):
    """The weather of the next days"""

    city: Literal["Bonn", "Oslo"]
    days: Annotated[int, Field(ge=1, le=9)]


class Clock(BaseModel):
    zone: Annotated[str, Field(max_length=5)] | None


TOOLS: list[Any] = [openai.pydantic_function_tool(each) for each in (Forecast, Clock)]
NAMED: Any = {"type": "function", "function": {"name": "Forecast"}}


@pytest.fixture(scope="module")
def client(server: LocalServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def weather(weather_url: str) -> Iterator[openai.OpenAI]:
    """A client of a server whose model calls "weather", if it is not told it."""
    with openai.OpenAI(base_url=f"{weather_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def fields(server: LocalServer) -> dict[str, Any]:
    """Fields of all chats. White space between the parts of JSON texts would fill the context."""
    bias = {str(token): -100 for token in server.tokenizer.encode(" \t\n")}
    return {"model": MODEL, "messages": HELLO, "temperature": 0, "logit_bias": bias}


def test_parsed_answers(client: Any, fields: dict[str, Any]) -> None:
    answer = client.chat.completions.parse(**fields, response_format=Person)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Person)
    assert choice.message.parsed == Person.model_validate_json(choice.message.content or "")
    with client.chat.completions.stream(**fields, response_format=Person) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.parsed == choice.message.parsed


def test_parsed_answers_of_async_clients(server: LocalServer, fields: dict[str, Any]) -> None:
    async def ask() -> list[Any]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            chats = client.chat.completions
            parsed = chats.parse(**fields, response_format=Address)
            called = chats.parse(**fields, tools=TOOLS, tool_choice=NAMED)
            answers = await asyncio.gather(parsed, called)
            async with chats.stream(**fields, tools=TOOLS, tool_choice=NAMED) as stream:
                return [*answers, await stream.get_final_completion()]

    parsed, *called = [answer.choices[0].message for answer in asyncio.run(ask())]
    assert isinstance(parsed.parsed, Address)
    for message in called:
        assert isinstance(message.tool_calls[0].function.parsed_arguments, Forecast)


def test_an_answer_that_is_cut_off(client: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**fields, response_format=Person, max_tokens=9)


def test_schemas_and_json_objects(server: LocalServer, client: Any, fields: dict[str, Any]) -> None:
    schema = {"name": "address", "schema": Address.model_json_schema(), "strict": True}
    answer = client.chat.completions.create(
        **fields, response_format={"type": "json_schema", "json_schema": schema}
    )
    assert Address.model_validate_json(answer.choices[0].message.content)
    # The bias makes the object close as soon as it can.
    (closing,) = server.tokenizer.encode("}")
    fields = fields | {"logit_bias": fields["logit_bias"] | {str(closing): 100}}
    answer = client.chat.completions.create(**fields, response_format={"type": "json_object"})
    assert answer.choices[0].message.content == "{}"


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_calls_that_must_come(client: Any, fields: dict[str, Any], choice: Any) -> None:
    asked = {**fields, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    answer = client.chat.completions.parse(**asked)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    assert isinstance(call.function.parsed_arguments, Forecast | Clock)
    assert choice == "required" or call.function.name == "Forecast"
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        events = [*stream]
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls" and final.usage == answer.usage
    (again,) = final.choices[0].message.tool_calls
    assert again.function.parsed_arguments == call.function.parsed_arguments
    assert again.id.startswith("call_") and again.id != call.id
    deltas = [each for each in events if each.type == "tool_calls.function.arguments.delta"]
    assert "".join(each.arguments_delta for each in deltas) == call.function.arguments
    assert len(deltas) > 3


def test_several_calls_at_once(server: LocalServer, client: Any, fields: dict[str, Any]) -> None:
    (comma,) = server.tokenizer.encode(",")
    fields = fields | {"logit_bias": {str(comma): 100}, "max_tokens": 200}
    answer = client.chat.completions.create(**fields, tools=TOOLS, tool_choice="required")
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    *whole, _ = choice.message.tool_calls
    assert len({call.id for call in whole}) == len(whole) > 1
    for call in whole:
        model = {"Forecast": Forecast, "Clock": Clock}[call.function.name]
        model.model_validate_json(call.function.arguments)


def test_calls_that_need_not_come(client: Any, fields: dict[str, Any]) -> None:
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(
            **fields, tools=TOOLS, tool_choice=choice, max_tokens=5
        )
        assert answer.choices[0].message.tool_calls is None and answer.choices[0].message.content
    assert answer.usage and answer.usage.prompt_tokens == len("user: hello\nassistant: ")


def test_tools_and_a_format_at_once(
    server: LocalServer, client: Any, fields: dict[str, Any]
) -> None:
    """The answer has the format, or it begins as a call does."""
    asked = {**fields, "tools": TOOLS, "response_format": Address}
    for choice, kind in (("none", Address), (NAMED, type(None))):
        answer = client.chat.completions.parse(**asked, tool_choice=choice)
        assert isinstance(answer.choices[0].message.parsed, kind)
        assert bool(answer.choices[0].message.tool_calls) == (choice == NAMED)

    def biased(text: str) -> dict[str, Any]:
        (token,) = server.tokenizer.encode(text)
        return asked | {"logit_bias": fields["logit_bias"] | {str(token): 50}}

    answer = client.chat.completions.parse(**biased("{"))
    assert isinstance(answer.choices[0].message.parsed, Address)
    with pytest.raises(openai.LengthFinishReasonError) as cut:
        client.chat.completions.parse(**biased("<"), max_tokens=20)
    content = cut.value.completion.choices[0].message.content
    assert content and content.startswith("<tool_call>")


def test_a_loop_with_a_tool(weather: Any) -> None:
    """The model thinks and calls a tool; its message goes back with the tool's answer."""
    asked = {"model": MODEL, "tools": [WEATHER]}
    answer = weather.chat.completions.create(messages=HELLO, **asked)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("Let me see.", "hm")
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Bonn"}
    told = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    last = weather.chat.completions.create(messages=[*HELLO, message, told], **asked)
    assert last.choices[0].message.content == "It is sunny."
    assert last.choices[0].finish_reason == "stop"


def test_a_streamed_loop_with_a_tool(weather: Any) -> None:
    asked = {"model": MODEL, "tools": [WEATHER]}
    messages = [*HELLO]
    for ending in ("tool_calls", "stop"):
        with weather.chat.completions.stream(messages=messages, **asked) as stream:
            kinds = {event.type for event in stream}
            (choice,) = stream.get_final_completion().choices
        assert choice.finish_reason == ending
        assert ("tool_calls.function.arguments.done" in kinds) == (ending == "tool_calls")
        messages.append(choice.message)
        for call in choice.message.tool_calls or ():
            assert json.loads(call.function.arguments) == {"city": "Bonn"}
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    assert messages[-1].content == "It is sunny."
    thought = messages[1]
    assert (thought.content, thought.reasoning_content) == ("Let me see.", "hm")


def test_schemas_that_cannot_be_followed(client: Any, fields: dict[str, Any]) -> None:
    for schema in ({"type": "thing"}, {"type": "string", "pattern": "("}):
        wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        with pytest.raises(openai.BadRequestError, match="response_format: ") as caught:
            client.chat.completions.create(**fields, response_format=wanted)
        assert caught.value.param == "response_format"


def test_logprobs_of_a_structured_answer(client: Any, fields: dict[str, Any]) -> None:
    answer = client.chat.completions.parse(
        **fields, response_format=Address, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert choice.logprobs and choice.logprobs.content
    listed = b"".join(bytes(each.bytes or b"?") for each in choice.logprobs.content)
    assert answer.usage and len(choice.logprobs.content) == answer.usage.completion_tokens
    assert listed.startswith(b'{"street":"') and listed.endswith(b"}")
