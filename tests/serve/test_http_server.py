"""Connections of the HTTP server: too many, idle, half-closed and half-sent ones."""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from dance_jax.serve import http_server
from dance_jax.serve.http_server import HttpServer
from dance_jax.serve.metrics import HttpConnections
from tests.launch.launched import eventually

PATIENCE_S = 30.0
#: Bytes of an answer that fits into no buffer of the kernel.
LONG = 1 << 25


class App:
    """Answers when it is let go, and notes clients that went first."""

    def __init__(self) -> None:
        self.called, self.gone = threading.Event(), threading.Event()
        self.go = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while scope["path"] != "/unread" and (await receive()).get("more_body"):
            pass
        if scope["path"] == "/fails":
            raise RuntimeError("secret")
        self.called.set()
        if scope["path"] == "/stream":
            await StreamingResponse(self._events(), media_type="text/event-stream")(
                scope, receive, send
            )
            return
        if scope["path"] == "/slow":
            waits = [
                asyncio.ensure_future(each) for each in (self.go.wait(), self._disconnect(receive))
            ]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for each in waits:
                each.cancel()
        if scope["path"] == "/long":
            await PlainTextResponse(bytes(LONG))(scope, receive, send)
            return
        shown = scope["client"][0] if scope["path"] == "/client" else scope["path"]
        await JSONResponse({"path": shown})(scope, receive, send)

    async def _disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone.set()

    async def _events(self):
        yield "data: first\n\n"
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.gone.set()
            raise
        yield "data: last\n\n"


class Running:
    """An HttpServer in a thread."""

    def __init__(self, most: int, trusted_proxies: str = "") -> None:
        self._ready = threading.Event()
        self._most, self._trusted_proxies = most, trusted_proxies
        self.counts = HttpConnections()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = self._socket.getsockname()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.app = App()
        self.server = HttpServer(
            self.app, PATIENCE_S, 128, self._most, self.counts, self._trusted_proxies
        )
        self._ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            await self.server.serve([self._socket])

    def let_go(self) -> None:
        self.loop.call_soon_threadsafe(self.app.go.set)

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self._thread.join(PATIENCE_S)

    def connect(self) -> socket.socket:
        connection = socket.create_connection(self.address)
        connection.settimeout(PATIENCE_S)
        return connection

    def answer(self, request: bytes) -> bytes:
        """What the server sends to a client that sends this and nothing else."""
        with self.connect() as connection:
            connection.sendall(request)
            return rest(connection)


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running(4)
    yield running
    running.stop()


def request(path: str, *headers: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"GET {path} HTTP/{version}", "Host: x", *headers, "", ""]).encode()


def rest(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def read_until(connection: socket.socket, end: bytes) -> None:
    data = b""
    while not data.endswith(end):
        more = connection.recv(1 << 16)
        assert more, f"the connection was closed after {data!r}"
        data += more


def error_of(answer: bytes, status: int) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    phrase = http.HTTPStatus(status).phrase.encode()
    assert head.startswith(b"HTTP/1.1 %d %b\r\n" % (status, phrase)), answer
    assert b"content-type: application/json" in head.lower()
    return json.loads(body)["error"]


@pytest.mark.parametrize(
    ("trusted_proxies", "client"),
    [("127.0.0.1,::1", "192.0.2.7"), ("127.0.0.0/8", "192.0.2.7"), ("10.0.0.5", "127.0.0.1")],
)
def test_only_a_trusted_proxy_names_the_client(trusted_proxies: str, client: str) -> None:
    running = Running(4, trusted_proxies)
    try:
        with running.connect() as connection:
            connection.sendall(request("/client", "X-Forwarded-For: 198.51.100.1, 192.0.2.7"))
            read_until(connection, f'{{"path":"{client}"}}'.encode())
    finally:
        running.stop()


def test_excess_connections_are_told_so(running: Running) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(running.connect()) for _ in range(4)]
        for connection in idle:
            connection.sendall(request("/"))
            read_until(connection, b'{"path":"/"}')
        answer = running.answer(request("/"))
        error = error_of(answer, 503)
        assert "too many connections: 4 are open" in error["message"]
        assert running.counts.refused == 1
        assert eventually(lambda: running.counts.open == 4)
        assert b"retry-after: 5" in answer.lower()
        # The others are still served.
        idle[0].sendall(request("/again"))
        read_until(idle[0], b'{"path":"/again"}')


def test_connections_without_a_request_are_closed(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "HEAD_S", 0.3)
    assert running.answer(b"") == b""
    assert "headers did not arrive" in error_of(running.answer(b"GET / HT"), 408)["message"]
    assert running.counts.late == 1
    # A body that nobody reads and that never ends is no way around it.
    with running.connect() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(request("/unread", "Content-Length: 1000"))
        read_until(connection, b"}")
        connection.settimeout(0.05)
        for _ in range(100):
            connection.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                assert connection.recv(1) == b""
                break
        else:
            raise AssertionError("the connection stays open")


def test_a_slow_answer_is_no_late_request(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "HEAD_S", 0.2)
    with running.connect() as connection:
        connection.sendall(request("/slow"))
        connection.settimeout(1.0)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        running.let_go()
        connection.settimeout(PATIENCE_S)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("count", [1, 2])
def test_a_client_that_does_not_read_is_closed(
    running: Running, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Its answer waits; with a second request, that one's answer cannot begin either."""
    monkeypatch.setattr(http_server, "NOT_READ_S", 1.0)
    with running.connect() as idle, running.connect() as reading:
        for connection in (idle, reading):
            connection.sendall(count * request("/long"))
        unread = count * LONG
        while unread > 0:  # for longer than the idle one may take
            time.sleep(0.1)
            left = unread - (1 << 21)
            while unread > max(left, 0):
                got = len(reading.recv(1 << 18))
                assert got, "the connection was closed while its client read"
                unread -= got
        assert eventually(lambda: running.counts.open <= 1, 5)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("wait_s", [0.0, 1.0])
def test_a_half_closed_connection_gets_its_answer(
    running: Running, version: str, wait_s: float
) -> None:
    with running.connect() as connection:
        connection.sendall(request("/slow", version=version))
        connection.shutdown(socket.SHUT_WR)
        assert running.app.called.wait(PATIENCE_S)
        assert not running.app.gone.wait(wait_s)
        running.let_go()
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b'{"path":"/slow"}')


def test_two_requests_before_the_half_close_get_two_answers(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(request("/slow") + request("/second"))
        connection.shutdown(socket.SHUT_WR)
        assert running.app.called.wait(PATIENCE_S)
        running.let_go()
        answer = rest(connection)
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2
    assert answer.endswith(b'{"path":"/second"}')


def test_a_half_closed_stream_goes_on(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(request("/stream", version="1.0"))
        connection.shutdown(socket.SHUT_WR)
        assert running.app.called.wait(PATIENCE_S)
        assert not running.app.gone.wait(0.5)
        running.let_go()
        _, _, events = rest(connection).partition(b"\r\n\r\n")
    lines = [line for line in events.split(b"\n\n") if not line.startswith(b":")]
    assert lines == [b"data: first", b"data: last", b""]


@pytest.mark.parametrize("path", ["/slow", "/stream"])
@pytest.mark.parametrize("half", [False, True])
def test_a_client_that_is_gone_is_noticed(running: Running, path: str, half: bool) -> None:
    with running.connect() as connection:
        connection.sendall(request(path, version="1.0"))
        assert running.app.called.wait(PATIENCE_S)
        if half:
            connection.shutdown(socket.SHUT_WR)
            assert not running.app.gone.wait(0.3)
    assert running.app.gone.wait(PATIENCE_S)


@pytest.mark.parametrize(
    ("sent", "status"),
    [(request("/fails"), 500), (b"nonsense\r\n\r\n", 400)],
)
def test_every_error_is_json(running: Running, sent: bytes, status: int) -> None:
    error = error_of(running.answer(sent), status)
    assert error["type"] in ("server_error", "invalid_request_error")
    assert "secret" not in error["message"]


def test_a_call_that_waits_at_the_end_gets_an_error(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(request("/slow"))
        assert running.app.called.wait(PATIENCE_S)
        running.stop()
        assert error_of(rest(connection), 503)["message"].startswith("the server is shutting down")


#: Serves with few descriptors, and says how many connections it takes.
FEW = """
import asyncio, logging, resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
from dance_jax import logs
from dance_jax.serve.http_server import HttpServer, most_connections
from starlette.responses import PlainTextResponse
logs.begin()
async def main():
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(listener.getsockname()[1], most_connections(), flush=True)
    await HttpServer(PlainTextResponse("ok"), 5, 2048).serve([listener])
asyncio.run(main())
"""


def test_many_connections_leave_descriptors_and_a_short_log() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FEW], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        port, most = map(int, process.stdout.readline().split())
        assert most == 300 - http_server.RESERVE
        try:
            with contextlib.ExitStack() as stack:
                connections = [
                    stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                    for _ in range(700)
                ]
                time.sleep(2)
                answers = [refusal(each) for each in connections]
                for _ in range(400):  # these are refused when they have gone already
                    socket.create_connection(("127.0.0.1", port)).close()
            assert sum(answer.startswith(b"HTTP/1.1 503 ") for answer in answers) >= 700 - most
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.settimeout(PATIENCE_S)
                connection.sendall(request("/"))
                assert b" 200 " in connection.recv(1 << 16)
        finally:
            process.kill()
        _, log = process.communicate()
    assert b"Too many open files" not in log and b"Traceback" not in log
    assert log.count(b"a connection was refused") < 60
    assert len(log) < 20_000


def refusal(connection: socket.socket) -> bytes:
    """The answer to a connection that sends nothing; empty if it was taken."""
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        return connection.recv(1 << 16)
    return b""
