"""Answers that break off, and go on at another server."""

from __future__ import annotations

import contextlib
import socket
import string
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from dance_jax.engine.detokenizer import Detokenizer
from dance_jax.engine.sequence import OutputDelta, Request
from dance_jax.launch.control.protocol import Abort
from dance_jax.serve.app import ServeInfo
from tests.serve.local_server import MODEL, PATIENCE_S, HttpThread, LocalServer, stopping
from tests.serve.scripted import ScriptedQueue, application

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
#: Output tokens of a whole answer, and events before it breaks off.
LENGTH, EVENTS = 40, 15


def complete(clients: Any, prompt: Any, max_tokens: int, **extra: Any) -> tuple[str, list[int]]:
    """A greedy completion and its tokens; where a server breaks off, the next one goes on."""
    text, failure, extra = "", None, {"return_token_ids": True, **extra}
    fields: Any = {"model": MODEL, "temperature": 0, "stream": True, "extra_body": extra}
    for client in clients:
        try:
            for chunk in client.completions.create(prompt=prompt, max_tokens=max_tokens, **fields):
                (part,) = chunk.choices
                prompt = part.prompt_token_ids if isinstance(prompt, str) else prompt
                prompt, max_tokens = prompt + part.token_ids, max_tokens - len(part.token_ids)
                text += part.text
                if part.finish_reason:
                    return text, prompt
        except openai.APIError as error:
            failure = error
    raise failure or ConnectionError("all servers broke off")


def chat(clients: Any, messages: Any, max_tokens: int, **extra: Any) -> str:
    """A greedy answer; where a server breaks off, the next one goes on with the text so far."""
    text, failure, fields = "", None, {"model": MODEL, "temperature": 0, "stream": True}
    for client in clients:
        said = [{"role": "assistant", "content": text}] if text else []
        fields |= {"messages": messages + said, "max_tokens": max_tokens}
        fields["extra_body"] = {"continue_final_message": bool(said), **extra}
        try:
            for number, chunk in enumerate(client.chat.completions.create(**fields)):
                (part,) = chunk.choices
                text += part.delta.content
                max_tokens -= number > 0  # the first chunk has no token
                if part.finish_reason:
                    return text
        except openai.APIError as error:
            failure = error
    raise failure or ConnectionError("all servers broke off")


@pytest.fixture(scope="module")
def client(server: LocalServer) -> Iterator[openai.OpenAI]:
    with connected(server.url) as client:
        yield client


def connected(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@contextlib.contextmanager
def breaking(server: LocalServer) -> Iterator[openai.OpenAI]:
    """A client whose first answer breaks off after EVENTS events; the engine then aborts it."""
    for commands in (server.engine.seen, server.engine.aborted):
        while not commands.empty():
            commands.get()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = threading.Thread(target=relay_events, args=(listener, server))
        relay.start()
        with connected(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            yield client
        relay.join()
    server.engine.aborted.get(timeout=PATIENCE_S)


def relay_events(listener: socket.socket, server: LocalServer) -> None:
    """Relay one connection until EVENTS events have passed; then the server notices the hang-up."""
    near, _ = listener.accept()
    with near, socket.create_connection(server.address) as far, server.engine.held() as steps:
        # A few more than the events, and fewer than the answer needs.
        steps.release(EVENTS + 5)
        there = threading.Thread(target=relay_all, args=(near, far))
        there.start()
        seen = 0
        while seen < EVENTS:
            data = far.recv(1 << 16)
            seen += data.count(b"data: ")
            near.sendall(data)
        for each in (near, far):
            each.shutdown(socket.SHUT_RDWR)
        there.join()
        while not isinstance(server.engine.seen.get(timeout=PATIENCE_S), Abort):
            pass


def relay_all(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)


def letters(server: LocalServer) -> dict[str, Any]:
    """A field that keeps the random model to letters."""
    return {"allowed_token_ids": server.tokenizer.encode(string.ascii_letters + " ")}


def test_a_completion_goes_on(server: LocalServer, client: openai.OpenAI) -> None:
    for extra in ({"ignore_eos": True}, letters(server)):
        text, ids = complete([client], "once upon", LENGTH, **extra)
        assert len(ids) == len("once upon") + LENGTH
        with breaking(server) as broken:
            again, again_ids = complete([broken, client], "once upon", LENGTH, **extra)
        # Texts of random bytes, which are no characters, may differ in their U+FFFD.
        assert again_ids == ids and (again == text or "\ufffd" in text)


def test_texts_go_on_within_a_character(server: LocalServer) -> None:
    tokens = server.tokenizer.encode("añ€😀 b漢")

    def text(prompt: list[int], output: list[int]) -> str:
        detokenizer = Detokenizer(server.tokenizer, prompt)
        return "".join(map(detokenizer.append, output))

    for cut in range(1, len(tokens)):
        there, here = tokens[:cut], tokens[cut:]
        assert text([], there) + text(there, here) == "añ€😀 b漢"


def test_a_chat_goes_on(server: LocalServer, client: openai.OpenAI) -> None:
    """By its text, and by its tokens as a completion."""
    extra = letters(server)
    text = chat([client], HELLO, LENGTH, **extra)
    assert len(text) == LENGTH
    with breaking(server) as broken:
        assert chat([broken, client], HELLO, LENGTH, **extra) == text
    whole: Any = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=EVENTS,
        temperature=0,
        extra_body={"return_token_ids": True, **extra},
    )
    ids = whole.prompt_token_ids + whole.choices[0].token_ids
    rest, _ = complete([client], ids, LENGTH - EVENTS, **extra)
    assert whole.choices[0].message.content + rest == text


def test_a_server_that_says_that_it_stops(
    server: LocalServer, client: openai.OpenAI, info: ServeInfo
) -> None:
    """Its stream ends with an error."""
    whole, ids = complete([client], "once upon", LENGTH, **letters(server))
    begun = ids[-LENGTH : EVENTS - LENGTH]

    def stops(request: Request) -> Iterator[OutputDelta]:
        for token, char in zip(begun, whole, strict=False):
            yield OutputDelta(request.request_id, 0, char, [token])
        yield OutputDelta(request.request_id, 0, finish_reason="abort")

    with stopping(HttpThread(application(ScriptedQueue(stops), info))) as other:
        stopped = connected(other.url)
        again = complete([stopped, client], "once upon", LENGTH, **letters(server))
        assert again == (whole, ids)
        stopped.close()


def test_no_server_is_left(server: LocalServer, client: openai.OpenAI) -> None:
    with breaking(server) as broken, pytest.raises(openai.APIConnectionError):
        complete([broken], "once upon", LENGTH, ignore_eos=True)
    with pytest.raises(openai.BadRequestError, match="bad_words"):
        complete([client], "once upon", LENGTH, bad_words=7)
