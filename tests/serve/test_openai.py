"""OpenAI's client, and clients that hang up, against a real server with a real engine."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import openai
import pytest

from dance_jax.serve.bodies import MAX_BODY
from tests.serve.local_server import CONTEXT, MODEL, PATIENCE_S, LocalServer

GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(server: LocalServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(
    client: openai.OpenAI, prompt: Any = "once upon", max_tokens: int = 12, **fields: Any
) -> Any:
    """A greedy completion; fields that the client does not know go into the body as they are."""
    known = inspect.signature(client.completions.create).parameters
    more = GREEDY["extra_body"] | {name: fields.pop(name) for name in {*fields} - {*known}}
    fields = GREEDY | fields | {"extra_body": more}
    return client.completions.create(model=MODEL, prompt=prompt, max_tokens=max_tokens, **fields)


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
    as_prompt = complete(client, prompt="user: hello\nassistant: ")
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


def test_echoed_prompts_have_the_logprobs_of_generated_tokens(client: openai.OpenAI) -> None:
    """What lm-evaluation-harness sends: prompts as tokens, of which the last ones count."""
    first = complete(client, max_tokens=8, logprobs=1, return_token_ids=True).choices[0]
    ids = first.prompt_token_ids + first.token_ids
    begins = len(first.prompt_token_ids)
    for max_tokens in (0, 1):
        answer = complete(client, [ids, ids[:-1]], max_tokens, logprobs=1, echo=True, seed=1234)
        for choice, length in zip(answer.choices, (len(ids), len(ids) - 1), strict=True):
            found = choice.logprobs
            assert len(found.tokens) == len(found.text_offset) == length + max_tokens
            assert found.token_logprobs[0] is found.top_logprobs[0] is None
            part = slice(begins, length)
            assert found.tokens[part] == first.logprobs.tokens[: length - begins]
            assert found.token_logprobs[part] == pytest.approx(
                first.logprobs.token_logprobs[: length - begins], abs=1e-4
            )
            # The tokens were generated greedily, which the harness finds out so:
            for token, top in zip(found.tokens[part], found.top_logprobs[part], strict=True):
                assert token == max(top, key=top.get)
        assert answer.usage.completion_tokens == 2 * max_tokens
    whole = complete(client, max_tokens=8, echo=True).choices[0].text
    assert whole == "once upon" + first.text
    chunks = complete(client, max_tokens=8, echo=True, logprobs=1, stream=True)
    parts = [chunk.choices[0] for chunk in chunks]
    assert "".join(part.text for part in parts) == whole
    assert sum(len(part.logprobs.tokens) for part in parts) == len(ids)


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    found = complete(client, max_tokens=0, prompt_logprobs=2).choices[0].prompt_logprobs
    echoed = complete(client, max_tokens=0, logprobs=2, echo=True).choices[0].logprobs
    assert found[0] is None and len(found) == len("once upon")
    for char, listed, logprob in zip("nce upon", found[1:], echoed.token_logprobs[1:], strict=True):
        own = [each for each in listed.values() if each["decoded_token"] == char]
        assert [each["logprob"] for each in own] == [logprob] and own[0]["rank"] >= 1
        assert len(listed) >= 2 and 1 in [each["rank"] for each in listed.values()]
    chat: Any = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=1, extra_body={"prompt_logprobs": 0}
    )
    assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens


def test_token_ids(client: Any, server: LocalServer) -> None:
    whole = complete(client, return_token_ids=True).choices[0]
    assert whole.prompt_token_ids == server.tokenizer.encode("once upon")
    assert server.tokenizer.decode(whole.token_ids).startswith(whole.text.rstrip("\ufffd"))
    parts = [c.choices[0] for c in complete(client, return_token_ids=True, stream=True)]
    assert [token for part in parts for token in part.token_ids] == whole.token_ids
    assert parts[0].prompt_token_ids == whole.prompt_token_ids
    fields: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 6, "temperature": 0}
    fields["extra_body"] = {"return_token_ids": True}
    chat: Any = client.chat.completions.create(**fields)
    assert server.tokenizer.decode(chat.prompt_token_ids) == "user: hello\nassistant: "
    first, *chunks = client.chat.completions.create(**fields, stream=True)
    assert first.prompt_token_ids == chat.prompt_token_ids
    ids = [token for chunk in chunks for token in chunk.choices[0].token_ids]
    assert ids == chat.choices[0].token_ids and len(ids) == 6
    named = complete(client, logprobs=0, return_tokens_as_token_ids=True).choices[0].logprobs
    assert named.tokens == [f"token_id:{token}" for token in whole.token_ids]


def test_structured_completions(client: openai.OpenAI, server: LocalServer) -> None:
    # Against white space between the parts of JSON texts.
    bias = {str(token): -100 for token in server.tokenizer.encode(" \t\n")}
    for field in ("structured_outputs", "guided"):

        def text(field: str = field, **way: Any) -> str:
            fields = {f"guided_{name}": value for name, value in way.items()}
            fields = fields if field == "guided" else {field: way}
            (choice,) = complete(client, max_tokens=20, logit_bias=bias, **fields).choices
            assert choice.finish_reason == "stop"
            return choice.text

        assert re.fullmatch("[a-c]{3}x", text(regex="[a-c]{3}x"))
        assert text(choice=["yes", "no"]) in ("yes", "no")
        assert text(grammar='root ::= "so" ("!" | "?")') in ("so!", "so?")
        schema = {"type": "array", "items": {"enum": [7]}, "minItems": 1, "maxItems": 2}
        assert json.loads(text(json=schema)) in ([7], [7, 7])


def test_words_and_tokens_that_are_not_allowed(client: openai.OpenAI, server: LocalServer) -> None:
    encode = server.tokenizer.encode
    only: Any = {"allowed_token_ids": encode("abc")}
    free = complete(client, **only).choices[0].text
    assert {*free} <= {*"abc"} and len(free) == 12
    word = free[3:5]
    bad = complete(client, **only, bad_words=[word]).choices[0].text
    assert word not in bad and {*bad} <= {*"abc"} and len(bad) == 12
    assert free[0] not in complete(client, **only, bad_words=[free[0]]).choices[0].text
    special: Any = {"allowed_token_ids": [0], "max_tokens": 2}
    assert complete(client, **special).choices[0].text == ""
    shown = complete(client, **special, skip_special_tokens=False)
    assert shown.choices[0].text == "<s><s>"


def test_stops_that_are_kept(client: openai.OpenAI, server: LocalServer) -> None:
    fields: Any = {"structured_outputs": {"regex": "aabaa"}, "include_stop_str_in_output": True}
    (token,) = server.tokenizer.encode("b")
    stops: Any = {"stop": ["b"]}, {"stop_token_ids": [token]}
    for stop in stops:
        for stream in (False, True):
            answer = complete(client, **fields, **stop, stream=stream)
            parts = [part.choices[0] for part in (answer if stream else [answer])]
            assert "".join(part.text for part in parts) == "aab"
            assert parts[-1].finish_reason == "stop"
            assert parts[-1].stop_reason == ("b" if "stop" in stop else token)


def test_prompts_that_are_cut(client: openai.OpenAI) -> None:
    cut = complete(client, truncate_prompt_tokens=4, return_token_ids=True)
    alone = complete(client, prompt="upon", return_token_ids=True)
    assert cut.choices == alone.choices and cut.usage == alone.usage
    longest = complete(client, prompt="x" * 2 * CONTEXT, truncate_prompt_tokens=-1)
    assert longest.usage.total_tokens == CONTEXT


def test_usage_of_each_chunk(client: Any) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    fields: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 5, **GREEDY}
    for chunks in (
        complete(client, max_tokens=5, stream=True, stream_options=options),
        client.chat.completions.create(**fields, stream=True, stream_options=options),
    ):
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert sorted(counts) == counts and {*counts} == {1, 2, 3, 4, 5} and counts[-2:] == [5, 5]


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
        complete(client, prompt="x" * CONTEXT)
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
