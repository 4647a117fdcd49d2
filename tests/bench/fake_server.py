"""Fake servers with the completions API that compute nothing."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

MODEL = "fake"
KNOWN = {"model", "prompt", "max_tokens", "temperature", "ignore_eos", "stream", "stream_options"}
KNOWN |= {"logprobs"}
#: Index of the token that differs between two answers to one prompt, if they are to differ.
DISTURBED = 1


@dataclasses.dataclass
class FakeServer:
    """One server, which records its requests.

    `events` are ("start" | "end", prompt), in order. No stream begins before `gather` requests have
    arrived. With `margin`, a prompt's second answer differs at token DISTURBED, where `margin` is
    the difference between the two most likely tokens' logprobs.
    """

    context: int = 2048
    #: Whether /v1/models says the context.
    says_context: bool = True
    #: Names of other models in /v1/models.
    others: tuple[str, ...] = ()
    #: Bearer token that requests must carry.
    key: str | None = None
    gather: int = 0
    #: Seconds to sleep after each token, so that answers that may overlap do.
    pace_s: float = 0.0
    margin: float | None = None
    #: Number of requests of /ready to answer with 503.
    loading: int = 0
    #: The last chunk of every stream; None to close the connection without one.
    last: bytes | None = b"data: [DONE]\n\n"
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    events: list[tuple[str, list[int] | str]] = dataclasses.field(default_factory=list)
    port: int = 0
    _seen: collections.Counter[tuple[int, ...]] = dataclasses.field(
        default_factory=collections.Counter
    )
    _gathered: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    @property
    def prompts(self) -> list[list[int] | str]:
        """Prompts of accepted requests, in order of arrival."""
        return [prompt for event, prompt in self.events if event == "start"]

    @property
    def most_running(self) -> int:
        running = most = 0
        for event, _ in self.events:
            running += 1 if event == "start" else -1
            most = max(most, running)
        return most

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection with one request."""
        with contextlib.suppress(ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            length = next(
                int(line.split(":")[1])
                for line in head.split("\r\n")
                if line.lower().startswith("content-length")
            )
            body = await reader.readexactly(length)
            if self.key is not None and f"Authorization: Bearer {self.key}\r\n" not in head:
                _whole(writer, 401, {"error": {"message": "wrong key", "type": "x"}})
            else:
                await self._answer(method, path, body, writer)
            await writer.drain()
        writer.close()

    async def _answer(
        self, method: str, path: str, body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        if (method, path) == ("POST", "/v1/completions"):
            status, why = self._refusal(body)
            if why:
                _whole(writer, status, {"error": {"message": why, "type": "x"}})
            else:
                await self._stream(json.loads(body), writer)
        elif path == "/ready":
            self.loading -= 1
            _whole(writer, 503 if self.loading >= 0 else 200, {})
        elif path == "/v1/models":
            card = {"id": MODEL} | ({"max_model_len": self.context} if self.says_context else {})
            _whole(writer, 200, {"data": [card, *({"id": name} for name in self.others)]})
        else:
            assert path == "/metrics"
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            # Every prompt has waited for a millisecond.
            waited = {"request_queue_time_seconds_sum": 0.001 * len(self.prompts)}
            values = dict.fromkeys(names, 0.0) | waited | self.metrics
            lines = [f'dance_jax:{name}{{model_name="a b"}} {n}' for name, n in values.items()]
            _whole(writer, 200, "\n".join(["# HELP x", *lines, ""]))

    def _refusal(self, body: bytes) -> tuple[int, str]:
        try:
            fields = json.loads(body)
        except ValueError:
            return 400, "no JSON"
        if not isinstance(fields, dict) or not set(fields) <= KNOWN:
            return 400, "unknown field"
        if fields["model"] != MODEL:
            return 404, "unknown model"
        prompt, longest = fields["prompt"], fields["max_tokens"]
        if not isinstance(longest, int) or longest < 1:
            return 400, "max_tokens"
        if not isinstance(prompt, list | str) or not 1 <= len(prompt) <= self.context - longest:
            return 400, "prompt"
        return 200, ""

    async def _stream(self, fields: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        prompt = fields["prompt"]
        self.events.append(("start", prompt))
        self._seen[tuple(prompt)] += 1
        if len(self.prompts) >= self.gather:
            self._gathered.set()
        await self._gathered.wait()
        again = self.margin is not None and self._seen[tuple(prompt)] > 1
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            for number in range(fields["max_tokens"]):
                disturbed = again and number == DISTURBED
                choice = self._choice(fields, number, disturbed)
                _event(writer, {"choices": [choice], "usage": None})
                await writer.drain()
                await asyncio.sleep(self.pace_s)
        finally:
            self.events.append(("end", prompt))
        usage = {"prompt_tokens": len(prompt), "completion_tokens": fields["max_tokens"]}
        _event(writer, {"choices": [], "usage": usage})
        if self.last is not None:
            _chunk(writer, self.last)
            writer.write(b"0\r\n\r\n")

    def _choice(self, fields: dict[str, Any], number: int, disturbed: bool) -> dict[str, Any]:
        text = f" {'other' if disturbed else 'token'}{number}"
        choice: dict[str, Any] = {"index": 0, "text": text, "stop_reason": None}
        last = number == fields["max_tokens"] - 1
        choice["finish_reason"] = "length" if last else None
        if "logprobs" in fields:
            assert fields["logprobs"] == 2
            top = {text: -0.25, " else": -0.25 - (self.margin or 1.0)}
            choice["logprobs"] = {
                "text_offset": [0],
                "tokens": [text],
                "token_logprobs": [-0.25],
                "top_logprobs": [top],
            }
        return choice


def _whole(writer: asyncio.StreamWriter, status: int, value: Any) -> None:
    body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


def _event(writer: asyncio.StreamWriter, value: Any) -> None:
    """Write an event as two HTTP chunks, because chunks need not match events."""
    data = f"data: {json.dumps(value)}\n\n".encode()
    _chunk(writer, data[: len(data) // 2])
    _chunk(writer, data[len(data) // 2 :])


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


async def listen(server: FakeServer, port: int = 0) -> asyncio.Server:
    """Start to serve, and set the server's port."""
    listening = await asyncio.start_server(server.serve, "127.0.0.1", port)
    server.port = listening.sockets[0].getsockname()[1]
    return listening


@contextlib.contextmanager
def running(servers: Sequence[FakeServer]) -> Iterator[list[str]]:
    """The servers' URLs; a thread runs the servers until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        for server in servers:
            asyncio.run_coroutine_threadsafe(listen(server), loop).result()
        yield [f"http://127.0.0.1:{server.port}" for server in servers]
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_all() -> None:
    """Cancel the connections still open, of users who hung up or of a failed test."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
