"""The HTTP client's reading of streams, against servers that split them anywhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from dance_jax.bench import client
from dance_jax.bench.client import Answer, Api, Call, parse_metrics
from dance_jax.bench.http import Address, HttpError, Response, request
from dance_jax.config import UserError
from tests.bench.fake_server import MODEL, FakeServer, running

EVENTS = b'data: {"a": 1}\n\n: a comment\r\n\r\ndata:{"b": 2}\r\n\r\nevent: x\ndata: [DONE]\n\n'


def reader_of(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


def chunked(data: bytes, size: int) -> bytes:
    """The data as an HTTP body with chunks of `size` bytes."""
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(b"%x;x=y\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


async def collect(events: AsyncIterator[bytes]) -> list[bytes]:
    return [event async for event in events]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_do_not_depend_on_where_a_stream_is_cut(size: int) -> None:
    async def read() -> list[bytes]:
        headers = {"transfer-encoding": "Chunked"}
        response = Response(200, headers, reader_of(chunked(EVENTS, size)))
        return await collect(response.events())

    assert asyncio.run(read()) == [b'{"a": 1}', b'{"b": 2}', b"[DONE]"]


def test_bodies_by_length_or_until_the_end() -> None:
    async def read(headers: dict[str, str]) -> bytes:
        return await Response(200, headers, reader_of(b"0123456789")).read()

    assert asyncio.run(read({"content-length": "4"})) == b"0123"
    assert asyncio.run(read({})) == b"0123456789"


@pytest.mark.parametrize("body", [b"", b"5\r\nabc", b"5\r\nabcde", b"no size\r\n", b"3\r\nabc\r\n"])
def test_a_chunked_body_that_ends_too_early_is_an_error(body: bytes) -> None:
    async def read() -> None:
        await Response(200, {"transfer-encoding": "chunked"}, reader_of(body)).read()

    with pytest.raises(HttpError):
        asyncio.run(read())


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8000", Address("127.0.0.1", 8000)),
        ("http://host/", Address("host", 80)),
        ("http://[::1]:81", Address("::1", 81)),
    ],
)
def test_addresses(url: str, address: Address) -> None:
    assert Address.of(url) == address == Address.of(f"http://{address}")


@pytest.mark.parametrize("url", ["host:80", "https://host", "http://", "http://a:b", "http://a/v1"])
def test_what_is_no_url_of_a_server(url: str) -> None:
    with pytest.raises(UserError, match="http://host:port is needed"):
        Address.of(url)


def answers(server: FakeServer, calls: Sequence[Call]) -> list[Answer]:
    """Answers to calls made one after the other."""

    async def ask(url: str) -> list[Answer]:
        api = await Api.connect([Address.of(url)])
        assert (api.model, api.max_model_len) == (MODEL, server.context)
        origin = time.perf_counter()
        return [await api.answer(call, origin, 0.0) for call in calls]

    with running([server]) as (url,):
        return asyncio.run(ask(url))


def test_an_answer_is_all_of_its_stream() -> None:
    server = FakeServer()
    plain, told = answers(server, [Call(0, [3, 4], 3), Call(0, [5], 2, logprobs=2)])
    assert plain.complete and plain.text == " token0 token1 token2"
    assert (plain.prompt_tokens, plain.output_tokens) == (2, 3)
    assert plain.finish_reason == "length" and plain.tokens == []
    assert len(plain.piece_s) == 3 and plain.piece_s == sorted(plain.piece_s)
    assert plain.piece_s[0] > 0 and plain.piece_s[-1] <= plain.end_s
    assert [token.text for token in told.tokens] == [" token0", " token1"]
    assert told.tokens[1].top == {" token1": -0.25, " else": -1.25}
    assert server.prompts == [[3, 4], [5]]


def test_every_piece_is_heard() -> None:
    async def ask(url: str) -> list[int]:
        api, heard = await Api.connect([Address.of(url)]), []
        await api.answer(Call(0, [1], 3), time.perf_counter(), 0.0, heard.append)
        return heard

    with running([FakeServer()]) as (url,):
        assert asyncio.run(ask(url)) == [1, 2, 3]


def test_hanging_up_in_the_middle() -> None:
    (answer,) = answers(FakeServer(), [Call(0, [1], 1000, hang_up_after=2)])
    assert answer.hung_up and answer.error is None and not answer.complete
    assert len(answer.piece_s) == 2


@pytest.mark.parametrize(
    ("last", "error"),
    [
        (None, "in the middle of an answer"),
        (b'data: {"error": {"message": "the engine failed", "type": "x"}}\n\n', "engine failed"),
        (b": nothing\n\n", "without [DONE]"),
        (b"data: {broken\n\n", "JSON is malformed"),
    ],
)
def test_streams_that_fail_are_told(last: bytes | None, error: str) -> None:
    (answer,) = answers(FakeServer(last=last), [Call(0, [1], 2)])
    assert not answer.complete and answer.error is not None
    assert error in answer.error


def test_refusals_have_status_and_message() -> None:
    (answer,) = answers(FakeServer(context=8), [Call(0, [1] * 9, 1)])
    assert answer.error == "HTTP 400: prompt" and answer.piece_s == []


def test_no_server() -> None:
    with running([FakeServer()]) as (url,):
        address = Address.of(url)

    async def ask() -> None:
        async with request(address, "GET", "/"):
            pass

    with pytest.raises(HttpError, match="cannot be reached"):
        asyncio.run(ask())
    with pytest.raises(UserError, match="cannot be reached"):
        asyncio.run(Api.connect([address]))


def test_metrics_add_up_over_labels() -> None:
    text = '# HELP x\nx{a="b c",d="e"} 2\nx{a="f"} 0.5\ny 1e3\nz{q="n"} NaN\n\n'
    found = parse_metrics(text)
    assert found.pop("z") != found
    assert found == {"x": 2.5, "y": 1000.0}


def test_a_server_that_says_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MODELS_S", 0.05)

    async def ask() -> None:
        async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) as listening:
            await Api.connect([Address(*listening.sockets[0].getsockname()[:2])])

    with pytest.raises(UserError, match=r"no answer within 0\.05 s"):
        asyncio.run(ask())
