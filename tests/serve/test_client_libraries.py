"""LangChain and LiteLLM against a real server with a real engine, and with a scripted one."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from tests.serve.local_server import MODEL, LocalServer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:litellm")
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
MAX_TOKENS = 80


class Forecast(BaseModel):
    """The weather of the next days"""

    city: Literal["Bonn", "Oslo"]
    days: Annotated[int, Field(ge=1, le=9)]


def weather(city: str) -> str:
    """The weather of a city"""
    return {"Bonn": "sunny"}[city]


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": weather.__doc__,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
FORECAST: Any = {
    "type": "function",
    "function": {"name": "Forecast", "parameters": Forecast.model_json_schema()},
}


@pytest.fixture(scope="module", autouse=True)
def no_network() -> Iterator[None]:
    """Lets no library look up the address of another machine, or ask one how it is."""
    asked, look_up = [], socket.getaddrinfo

    def local_only(host: Any, *args: Any, **more: Any) -> Any:
        if host not in ("127.0.0.1", "localhost"):
            asked.append(host)
            raise socket.gaierror(f"the tests have no network: {host}")
        return look_up(host, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", local_only)
        for name in [name for name in os.environ if name.startswith(("LANGCHAIN", "LANGSMITH"))]:
            patch.delenv(name)
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        yield
    assert not asked


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """One event loop, because the libraries keep their connections."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def dense(server: LocalServer) -> dict[str, int]:
    """A bias against white space between the parts of JSON texts, which would fill the context."""
    return {str(token): -100 for token in server.tokenizer.encode(" \t\n")}


@pytest.fixture(scope="module")
def model(server: LocalServer, dense: dict[str, int], no_network: None) -> Any:
    """LangChain's model."""
    return langchain_model(server.url, temperature=0, max_tokens=MAX_TOKENS, logit_bias=dense)


@pytest.fixture(scope="module")
def weather_model(weather_url: str, no_network: None) -> Any:
    """LangChain's model, which calls "weather"."""
    return langchain_model(weather_url).bind_tools([weather])


def langchain_model(url: str, **fields: Any) -> Any:
    from langchain_openai import ChatOpenAI

    fields |= {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "stream_usage": True}
    return ChatOpenAI(model=MODEL, **fields)


def test_langchain_chats(loop: asyncio.Runner, model: Any) -> None:
    answer = model.invoke("hello")
    assert answer.content and answer.response_metadata["finish_reason"] in ("length", "stop")
    usage = answer.usage_metadata
    assert usage["input_tokens"] == len("user: hello\nassistant: ")
    assert 0 < usage["output_tokens"] <= MAX_TOKENS
    assert loop.run(model.ainvoke("hello")).content == answer.content
    whole = joined(model.stream("hello"))
    assert (whole.content, whole.usage_metadata) == (answer.content, usage)


def test_langchain_batches(model: Any) -> None:
    alone = [model.invoke(text).content for text in ("one", "two")]
    assert [answer.content for answer in model.batch(["one", "two"])] == alone


@pytest.mark.parametrize("choice", ["required", "any", "Forecast"])
def test_langchain_calls(model: Any, choice: str) -> None:
    bound = model.bind_tools([Forecast], tool_choice=choice, parallel_tool_calls=False)
    answer = bound.invoke("hello")
    (call,) = answer.tool_calls
    assert call["name"] == "Forecast" and Forecast(**call["args"])
    assert not answer.invalid_tool_calls and not answer.content
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    whole = joined(bound.stream("hello"))
    assert [(each["name"], each["args"]) for each in whole.tool_calls] == [
        (call["name"], call["args"])
    ]
    assert whole.usage_metadata == answer.usage_metadata


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structures(loop: asyncio.Runner, model: Any, method: str) -> None:
    structured = model.with_structured_output(Forecast, method=method)
    assert isinstance(structured.invoke("hello"), Forecast)
    assert isinstance(loop.run(structured.ainvoke("hello")), Forecast)
    strict = model.with_structured_output(Forecast, method=method, strict=True, include_raw=True)
    answer = strict.invoke("hello")
    assert isinstance(answer["parsed"], Forecast) and answer["parsing_error"] is None


def test_langchain_tool_loop(weather_model: Any) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    messages: list[Any] = [HumanMessage("hello")]
    while calls := (answer := weather_model.invoke(messages)).tool_calls:
        messages.append(answer)
        for call in calls:
            assert call["name"] == "weather"
            messages.append(ToolMessage(weather(**call["args"]), tool_call_id=call["id"]))
    assert [message.content for message in messages] == ["hello", "Let me see.", "sunny"]
    assert answer.content == "It is sunny."
    assert joined(weather_model.stream(messages)).content == "It is sunny."


def test_langchain_errors(model: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="messages"):
        model.invoke([])


def joined(chunks: Any) -> Any:
    """The message that a stream of LangChain's adds up to."""
    first, *others = chunks
    for chunk in others:
        first += chunk
    return first


@pytest.fixture(scope="module")
def litellm(no_network: None) -> ModuleType:
    import litellm

    litellm.suppress_debug_info = True
    return litellm


@pytest.fixture(scope="module", params=["hosted_vllm", "openai"])
def fields(request: pytest.FixtureRequest, server: LocalServer) -> dict[str, Any]:
    """Fields of LiteLLM's calls."""
    return {
        "model": f"{request.param}/{MODEL}",
        "api_base": f"{server.url}/v1",
        "api_key": "none",
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "num_retries": 0,
    }


def test_litellm_chats(loop: asyncio.Runner, litellm: Any, fields: dict[str, Any]) -> None:
    fields = {**fields, "messages": HELLO, "max_tokens": 20}
    answer = litellm.completion(**fields)
    (choice,) = answer.choices
    assert choice.message.content and choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len("user: hello\nassistant: ")
    assert answer.usage.completion_tokens == 20
    later = loop.run(litellm.acompletion(**fields))
    assert later.choices[0].message.content == choice.message.content
    options = {"include_usage": True}
    chunks = list(litellm.completion(**fields, stream=True, stream_options=options))
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.content == choice.message.content
    assert whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens


def test_litellm_async_streams(loop: asyncio.Runner, litellm: Any, fields: dict[str, Any]) -> None:
    fields = {**fields, "messages": HELLO, "max_tokens": 20}

    async def streamed() -> str:
        chunks = await litellm.acompletion(**fields, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    assert loop.run(streamed()) == litellm.completion(**fields).choices[0].message.content


def test_litellm_texts(litellm: Any, fields: dict[str, Any]) -> None:
    fields = {**fields, "prompt": "once upon", "max_tokens": 20}
    answer = litellm.text_completion(**fields)
    assert answer.choices[0].text and answer.usage.completion_tokens == 20
    chunks = litellm.text_completion(**fields, stream=True)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == answer.choices[0].text


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "Forecast"}}]
)
def test_litellm_calls(litellm: Any, fields: dict[str, Any], choice: Any) -> None:
    fields = {**fields, "messages": HELLO, "tools": [FORECAST], "tool_choice": choice}
    fields["parallel_tool_calls"] = False
    answer = litellm.completion(**fields)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    whole = litellm.stream_chunk_builder(list(litellm.completion(**fields, stream=True)))
    (again,) = whole.choices[0].message.tool_calls
    for each in (call, again):
        assert each.function.name == "Forecast"
        assert Forecast.model_validate_json(each.function.arguments)


def test_litellm_structures(litellm: Any, fields: dict[str, Any], dense: dict[str, int]) -> None:
    fields = {**fields, "messages": HELLO, "logit_bias": dense}
    answer = litellm.completion(**fields, response_format=Forecast)
    assert Forecast.model_validate_json(answer.choices[0].message.content)
    schema = {"name": "f", "schema": Forecast.model_json_schema()}
    wanted = {"type": "json_schema", "json_schema": schema}
    answer = litellm.completion(**fields, response_format=wanted)
    assert Forecast.model_validate_json(answer.choices[0].message.content)
    chosen = litellm.completion(**fields, extra_body={"guided_choice": ["yes", "no"]}, top_k=5)
    assert chosen.choices[0].message.content in ("yes", "no")


def test_litellm_logprobs(litellm: Any, fields: dict[str, Any]) -> None:
    fields = {**fields, "messages": HELLO, "max_tokens": 5}
    answer = litellm.completion(**fields, logprobs=True, top_logprobs=2)
    listed = answer.choices[0].logprobs.content
    assert [len(each.top_logprobs) for each in listed] == [2] * 5


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
@pytest.mark.parametrize("stream", [False, True])
def test_litellm_tool_loop(litellm: Any, weather_url: str, provider: str, stream: bool) -> None:
    fields: Any = {"model": f"{provider}/{MODEL}", "api_base": f"{weather_url}/v1"}
    fields |= {"api_key": "none", "tools": [WEATHER], "stream": stream}
    messages = [*HELLO]
    while True:
        answer = litellm.completion(**fields, messages=messages)
        answer = litellm.stream_chunk_builder(list(answer)) if stream else answer
        message = answer.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            break
        assert (message.content, message.reasoning_content) == ("Let me see.", "hm")
        for call in message.tool_calls:
            told = weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": told})
    assert message.content == "It is sunny." and len(messages) == 4


def test_litellm_errors(litellm: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="messages: List should have"):
        litellm.completion(**fields, messages=[])
    with pytest.raises(litellm.NotFoundError, match="'other'"):
        provider, _, _ = fields["model"].partition("/")
        litellm.completion(**{**fields, "model": f"{provider}/other"}, messages=HELLO)
