"""OpenAI's client, and clients that hang up, against a real server with a real engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import openai
import pytest

from dance_jax.serve.bodies import MAX_BODY
from tests.serve.local_server import MODEL, PATIENCE_S, LocalServer, local_server

GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, expert_library: object
) -> Iterator[LocalServer]:
    with local_server(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LocalServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(
    client: openai.OpenAI, prompt: Any = "once upon", max_tokens: int = 12, **fields: Any
) -> Any:
    return client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=max_tokens, **GREEDY | fields
    )


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="'other'") as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_completions(client: openai.OpenAI) -> None:
    whole = complete(client)
    (choice,) = whole.choices
    assert choice.finish_reason == "length" and choice.text
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (9, 12)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == choice.text
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert len(chunks) > 3


def test_several_prompts_at_once(client: openai.OpenAI) -> None:
    prompts = ["one", "another one", "x" * 100, "one"]
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in prompts]
    together = complete(client, prompt=prompts)
    assert [choice.text for choice in together.choices] == alone
    assert together.usage.prompt_tokens == sum(map(len, prompts))
    texts = dict.fromkeys(range(4), "")
    for chunk in complete(client, prompt=prompts, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == alone


def test_chats(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 12, **GREEDY}
    whole = client.chat.completions.create(**fields)
    (choice,) = whole.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    as_prompt = complete(client, prompt="user: hello\nassistant:")
    assert choice.message.content == as_prompt.choices[0].text
    *chunks, last = client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage == whole.usage


def test_a_seed_repeats_samples(client: openai.OpenAI) -> None:
    sampled: dict[str, Any] = {"temperature": 1.0, "n": 3}

    def texts(seed: int) -> list[str]:
        return [choice.text for choice in complete(client, seed=seed, **sampled).choices]

    first = texts(5)
    assert len(set(first)) == 3
    assert texts(5) == first != texts(6)


def test_stops(client: openai.OpenAI, server: LocalServer) -> None:
    whole = complete(client, max_tokens=40).choices[0].text
    at = next(i for i in range(4, len(whole)) if "\ufffd" not in whole[i : i + 2])
    stop = whole[at : at + 2]
    for stream in (False, True):
        answer = complete(client, max_tokens=40, stop=["never there", stop], stream=stream)
        parts = list(answer) if stream else [answer]
        assert "".join(part.choices[0].text for part in parts) == whole[: whole.find(stop)]
        last = parts[-1].choices[0]
        assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    (again,) = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=3, stop="never there"
    ).choices
    assert again.finish_reason in ("stop", "length")


def test_logprobs(client: openai.OpenAI) -> None:
    answer = complete(client, max_tokens=6, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == 6
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 3 and top[token] == logprob == max(top.values()) < 0
    chat: Any = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=6, logprobs=True, top_logprobs=2, temperature=0
    )
    for entry in chat.choices[0].logprobs.content:
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert entry.top_logprobs[0].token == entry.token and len(entry.top_logprobs) == 2


def test_penalties_and_bias(client: openai.OpenAI, server: LocalServer) -> None:
    def ids(**fields: Any) -> list[str]:
        return complete(client, max_tokens=16, logprobs=0, **fields).choices[0].logprobs.tokens

    # A bias makes one token repeat; larger penalties stop the repetition.
    token = server.tokenizer.encode("z")[0]
    assert ids(logit_bias={str(token): 100}) == ["z"] * 16
    biased = {str(token + i): 10 for i in range(3)}
    assert len(set(ids(logit_bias=biased))) <= 3
    repeated = ids(logit_bias={str(token): 3})
    for name in ("frequency_penalty", "presence_penalty"):
        fresh = ids(logit_bias={str(token): 3}, **{name: 2})
        assert fresh.count("z") < repeated.count("z")


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, n=0)
    assert caught.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        complete(client, prompt="x" * 400)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")


def test_many_async_clients_at_once(client: openai.OpenAI, server: LocalServer) -> None:
    prompts = [f"number {i}" for i in range(12)]
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in prompts]

    async def ask(client: openai.AsyncOpenAI, prompt: str, stream: bool) -> str:
        answer: Any = await client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=12, stream=stream, **GREEDY
        )
        if not stream:
            return answer.choices[0].text
        return "".join([chunk.choices[0].text async for chunk in answer])

    async def ask_all() -> list[str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(
                *(ask(client, prompt, i % 2 == 0) for i, prompt in enumerate(prompts))
            )

    assert asyncio.run(ask_all()) == alone


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up(server: LocalServer, client: openai.OpenAI, stream: bool) -> None:
    engine = server.engine
    while not engine.seen.empty():
        engine.seen.get()
    body = {"prompt": ["one", "two"], "max_tokens": 100, "logprobs": 0, "ignore_eos": True}
    with engine.held() as steps, socket.create_connection(server.address) as connection:
        connection.settimeout(PATIENCE_S)
        connection.sendall(post("/v1/completions", body | {"stream": stream}))
        submitted: Any = [engine.seen.get(timeout=PATIENCE_S) for _ in range(2)]
        ids = {request.request_id for submit in submitted for request in submit.requests}
        assert len(ids) == 2
        if stream:
            steps.release(2)
            read_until(connection, b"data: ")
        connection.close()
        # The server notices the hang-up although the engine returns no tokens.
        aborts: Any = [engine.seen.get(timeout=PATIENCE_S) for _ in range(2)]
        assert {id for abort in aborts for id in abort.request_ids} == ids
    assert {engine.aborted.get(timeout=PATIENCE_S) for _ in range(2)} == ids
    assert server.queue.in_flight == 0
    complete(client)
    assert engine.aborted.empty()
    report = server.queue.report
    assert report is not None and (report.running, report.waiting) == (0, 0)


def test_a_body_that_never_ends(server: LocalServer) -> None:
    """A chunked body without a length is refused as soon as it is too large."""
    with socket.create_connection(server.address) as connection:
        connection.settimeout(PATIENCE_S)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"%x\r\n%b\r\n" % (1 << 16, b" " * (1 << 16))
        with contextlib.suppress(ConnectionError):
            for _ in range(MAX_BODY // (1 << 16) + 1):
                connection.sendall(chunk)
        assert b" 413 " in read_until(connection, b"\r\n")


def post(path: str, body: Mapping[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def read_until(connection: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        more = connection.recv(1 << 16)
        assert more, f"the connection was closed after {data!r}"
        data += more
    return data
