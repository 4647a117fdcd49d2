"""Clients that do not read their streams, on real connections; the queue is scripted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import pathlib
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator

import pytest
import uvicorn

from dance_jax.engine.sequence import OutputDelta, Request
from dance_jax.serve import delivery, unread
from tests.serve.scripted import ScriptedQueue, application, serve_info


class Server:
    """Serves an endless stream to each request.

    Args:
        directory: for the model's files.
        deltas: number of deltas that wait at once for each request.
    """

    def __init__(self, directory: pathlib.Path, deltas: int) -> None:
        def script(request: Request) -> Iterable[OutputDelta]:
            delta = OutputDelta(request.request_id, 0, text="text " * 10, token_ids=[5])
            return (delta for _ in range(deltas))

        self.queue = ScriptedQueue(script)
        app = application(self.queue, serve_info(directory))
        config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None)
        self.http = uvicorn.Server(config)
        self.listener = socket.create_server(("127.0.0.1", 0))
        unread.limit_unread(self.listener)

    @contextlib.contextmanager
    def running(self) -> Iterator[Server]:
        thread = threading.Thread(
            target=lambda: asyncio.run(self.http.serve([self.listener])), daemon=True
        )
        thread.start()
        try:
            yield self
        finally:
            self.http.should_exit = self.http.force_exit = True
            thread.join()
            self.listener.close()

    def ask(self) -> socket.socket:
        """Ask for a stream; nothing of it is read."""
        body = json.dumps({"prompt": "hi", "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        connection = socket.create_connection(self.listener.getsockname())
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        return connection

    @property
    def ended(self) -> int:
        """Requests that were aborted, or whose call is over."""
        return len(self.queue.closed)


def eventually(done: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition becomes true in time."""
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)
    return done()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_LOOK_S", 0.05)


def test_too_many_unread_tokens_end_a_stream(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with Server(tmp_path, 20_000).running() as server, server.ask():
        assert eventually(lambda: server.ended == 1, 20)
        address, port = server.listener.getsockname()
        with urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=20) as answer:
            assert b'streams_not_read_total{model_name="tiny"} 1.0' in answer.read()
    assert "client 127.0.0.1 does not read its stream" in caplog.text


def test_a_client_that_reads_nothing_is_disconnected(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (delivery, unread):
        monkeypatch.setattr(module, "UNREAD_S", 1.0)
    with Server(tmp_path, 3000).running() as server, server.ask():
        assert eventually(lambda: server.ended == 1, 20)
        # The rest of the stream, which has been written, must not hold the connection.
        assert eventually(lambda: not server.http.server_state.connections, 20)


def test_a_client_that_reads_late_is_served(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "UNREAD_S", 5.0)
    with Server(tmp_path, 3000).running() as server, server.ask() as connection:
        time.sleep(1)
        connection.settimeout(20)
        found = b""
        while found.count(b"data: ") < 3000:
            found += connection.recv(1 << 20)
        assert not server.ended
