"""Connections between servers: which are admitted, and for which topic."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dance_jax.models import connections
from dance_jax.models.connections import Connections, Credentials, Identity
from tests.launch.launched import eventually

NAMES = ("here", "there", "elsewhere")
IDENTITY = Identity("the model", "int8:32:bfloat16", "bfloat16")
CREDENTIALS = Credentials(b"the secret of this launch", IDENTITY)
ANOTHER = Credentials(b"another", IDENTITY)
#: Timeout in seconds, longer than anything here takes.
PATIENCE_S = 20.0
#: Connections that a listener admits: rank, index, connection.
Arrivals = queue.SimpleQueue[tuple[int, int, socket.socket]]


@pytest.fixture
def listen() -> Iterator[Callable[..., Connections]]:
    """Create the connections of server `rank`, which are closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def one(
            rank: int = 0, address: str = "127.0.0.1", credentials: Credentials = CREDENTIALS
        ) -> Connections:
            listener = Connections(rank, NAMES, address, credentials)
            stack.callback(listener.close)
            return listener

        yield one


def arrivals(listener: Connections, topic: str) -> Arrivals:
    """A queue of the connections that are admitted from now on."""
    found: Arrivals = queue.SimpleQueue()
    listener.handle(topic, lambda *call: found.put(call))
    return found


def call(
    listener: Connections,
    topic: str,
    index: int = 0,
    *,
    rank: int = 1,
    credentials: Credentials = CREDENTIALS,
):
    """The connection of server `rank` to server 0."""
    return call_at(listener.endpoint, topic, index, rank, credentials)


def call_at(
    endpoint: str, topic: str, index: int = 0, rank: int = 1, credentials: Credentials = CREDENTIALS
):
    """The connection of server `rank` to what listens at an endpoint, as to server 0."""
    with contextlib.closing(Connections(rank, NAMES, "127.0.0.1", credentials)) as caller:
        caller.endpoints[0] = endpoint
        return caller.dial(0, topic, index)


def first_call(listener: Connections, topic: str) -> socket.socket:
    """A connection for which the listener has finished the handshake."""
    connection = call(listener, topic)
    assert eventually(lambda: listener._waiting)
    return connection


def assert_connected(ours: socket.socket, theirs: socket.socket) -> None:
    for one, other in ((ours, theirs), (theirs, ours)):
        other.settimeout(PATIENCE_S)
        one.sendall(b"x")
        assert other.recv(1) == b"x"


def assert_closed(connection: socket.socket) -> None:
    connection.settimeout(PATIENCE_S)
    assert connection.recv(1) == b""


# One listener.


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_who_knows_the_key_is_connected(address: str, listen: Callable[..., Connections]):
    listener = listen(address=address)
    assert listener.endpoint.startswith("[::1]:" if address == "::1" else "127.0.0.1:")
    found = arrivals(listener, "links")
    with call(listener, "links", 3) as theirs:
        rank, index, ours = found.get(timeout=PATIENCE_S)
        with ours:
            assert (rank, index) == (1, 3)
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert_connected(ours, theirs)


def test_topics_are_told_apart(listen: Callable[..., Connections]):
    """One topic has a handler before the call, the other topic gets its handler afterwards."""
    listener = listen()
    bell = arrivals(listener, "bell")
    with call(listener, "links") as for_links, call(listener, "bell") as for_bell:
        with bell.get(timeout=PATIENCE_S)[2] as ours:
            assert_connected(ours, for_bell)
        with arrivals(listener, "links").get(timeout=PATIENCE_S)[2] as ours:
            assert_connected(ours, for_links)
    assert bell.empty()


def test_a_server_that_calls_again(listen: Callable[..., Connections]):
    """Of several waiting calls only the latest is admitted; an admitted call does not end."""
    listener = listen()
    with first_call(listener, "links") as early, call(listener, "links") as late:
        assert_closed(early)
        found = arrivals(listener, "links")
        with found.get(timeout=PATIENCE_S)[2] as ours:
            assert_connected(ours, late)
        with call(listener, "links") as again, found.get(timeout=PATIENCE_S)[2] as ours:
            assert_connected(ours, again)
    assert found.empty()


@pytest.mark.parametrize("caller", [0, 3])
def test_ranks_that_cannot_call(
    caller: int, listen: Callable[..., Connections], caplog: pytest.LogCaptureFixture
):
    with call(listen(), "links", rank=caller) as theirs:
        assert_closed(theirs)
    assert f"invalid rank {caller}: this is server 0 of 3" in caplog.text


def test_another_key_is_refused(listen: Callable[..., Connections]):
    listener = listen()
    found = arrivals(listener, "links")
    with pytest.raises(RuntimeError, match=r"server here at 127.*another key"):
        call(listener, "links", credentials=ANOTHER)
    assert found.empty()


@pytest.mark.parametrize(
    ("rates", "paced"),
    [((100e6, 80e6), 11_000_000), ((None, 80e6), 11_000_000), ((None, None), None)],
)
def test_what_is_sent_is_paced_to_the_slowest_known_link(
    rates: tuple[float | None, ...], paced: int | None
):
    with socket.socket() as connection:
        before = _pacing(connection)
        connections.pace(connection, *rates)
        wanted = paced if paced is not None and sys.platform == "linux" else before
        assert _pacing(connection) == wanted


def _pacing(connection: socket.socket) -> int | None:
    """Pacing rate in bytes per second; None if the system cannot tell."""
    if sys.platform != "linux":
        return None
    number = connection.getsockopt(socket.SOL_SOCKET, connections._SO_MAX_PACING_RATE, 8)
    return int.from_bytes(number, sys.byteorder)


@pytest.mark.parametrize(
    ("field", "theirs", "words"),
    [
        ("protocol", 99, "its protocol is {}, but this server's is {}: install the same version"),
        ("model", "another", "its model is {}, but this server's is {}: copy the same files"),
        (
            "experts",
            "int4:32:float16",
            "its format of experts is {}, but this server's is {}: convert",
        ),
        ("wire", "float32", "its wire type is {}, but this server's is {}: start all servers"),
    ],
)
def test_another_identity_is_refused_at_both_ends(
    field: str,
    theirs: object,
    words: str,
    listen: Callable[..., Connections],
    caplog: pytest.LogCaptureFixture,
):
    listener, ours = listen(), getattr(IDENTITY, field)
    found = arrivals(listener, "links")
    other = Credentials(CREDENTIALS.secret, dataclasses.replace(IDENTITY, **{field: theirs}))
    with pytest.raises(RuntimeError) as error:
        call(listener, "links", credentials=other)
    assert str(error.value).startswith(f"cannot connect to server here at {listener.endpoint}: ")
    assert words.format(ours, theirs) in str(error.value)
    assert eventually(lambda: words.format(theirs, ours) in caplog.text)
    assert found.empty()


def test_who_has_not_proved_itself_is_told_nothing(listen: Callable[..., Connections]):
    """Neither the called server nor the calling server sends its identity."""
    with socket.create_connection(address(listen())) as stranger:
        stranger.settimeout(PATIENCE_S)
        stranger.sendall(connections._CALL.pack(1, 0, 5) + b"links" + bytes(32 + 32))
        told = b"".join(iter(lambda: stranger.recv(1000), b""))
    assert len(told) == 32 + 32, "a nonce and a proof"
    with (
        socket.create_server(("127.0.0.1", 0)) as stranger,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        endpoint = "{}:{}".format(*stranger.getsockname())
        calling = pool.submit(call_at, endpoint, "links")
        connection, _ = stranger.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            connection.sendall(bytes(32 + 32))
            told = b"".join(iter(lambda: connection.recv(1000), b""))
        with pytest.raises(RuntimeError, match="another key"):
            calling.result(PATIENCE_S)
    assert len(told) == connections._CALL.size + len("links") + 32


def test_what_is_no_identity_is_refused(listen: Callable[..., Connections]):
    """The sender knows the secret, like a server of another version."""
    listener = listen()
    found = arrivals(listener, "links")
    for content in (b"no", b"[]", b"3", bytes(70)):
        with socket.create_connection(address(listener)) as other:
            other.settimeout(PATIENCE_S)
            head = connections._CALL.pack(1, 0, 5) + b"links"
            other.sendall(head + bytes(32))
            theirs = connections._receive(other, 32 + 32)[:32]
            proof = connections._mac(CREDENTIALS.secret, b"call", head, 0, bytes(32), theirs)
            other.sendall(proof + connections._LENGTH.pack(len(content)) + content)
            while other.recv(1000):
                pass
    assert found.empty()


def test_a_call_cannot_be_turned_into_another(listen: Callable[..., Connections]):
    """A man in the middle changes the topic; the called server's proof covers what it received."""
    listener = listen()
    found = arrivals(listener, "bell")
    with socket.create_server(("127.0.0.1", 0)) as between:

        def forward() -> None:
            caller, _ = between.accept()
            called = socket.create_connection(address(listener))
            with caller, called:
                called.sendall(caller.recv(1000).replace(b"bull", b"bell"))
                with contextlib.suppress(OSError):
                    while part := called.recv(1000):
                        caller.sendall(part)

        threading.Thread(target=forward, daemon=True).start()
        endpoint = "{}:{}".format(*between.getsockname())
        with pytest.raises(RuntimeError, match="another key"):
            call_at(endpoint, "bull")
    assert found.empty()


def address(listener: Connections) -> tuple[str, int]:
    host, port = listener.endpoint.split(":")
    return host, int(port)


def test_strangers_do_not_stop_the_others(listen: Callable[..., Connections]):
    """One client sends nothing, one disconnects, one speaks another protocol."""
    listener = listen()
    found = arrivals(listener, "links")
    with contextlib.ExitStack() as stack:
        silent, gone, talkative = (
            stack.enter_context(socket.create_connection(address(listener))) for _ in range(3)
        )
        gone.close()
        talkative.sendall(b"GET / HTTP/1.1\r\n\r\n" * 80)
        theirs = stack.enter_context(call(listener, "links"))
        assert_connected(stack.enter_context(found.get(timeout=PATIENCE_S)[2]), theirs)
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.recv(1)


def test_who_says_nothing_is_not_waited_for(
    listen: Callable[..., Connections],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(connections, "_HANDSHAKE_S", 0.05)
    with socket.create_connection(address(listen())) as silent:
        assert_closed(silent)
    assert "rejected: timed out" in caplog.text


def test_who_says_little_by_little_is_not_waited_for(
    listen: Callable[..., Connections], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connections, "_HANDSHAKE_S", 0.3)
    with socket.create_connection(address(listen())) as slow, pytest.raises(OSError):
        for _ in range(200):
            slow.sendall(b"\0")
            time.sleep(0.05)


def test_many_strangers_keep_few_threads_and_nobody_out(
    listen: Callable[..., Connections], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connections, "_HANDSHAKES", 4)
    monkeypatch.setattr(connections, "_HANDSHAKE_S", 2.0)
    before = {*threading.enumerate()}
    listener = listen()
    found = arrivals(listener, "links")
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(socket.create_connection(address(listener)))
        time.sleep(1.0)
        admitting = [thread.name for thread in {*threading.enumerate()} - before]
        assert sorted(admitting) == ["admit"] * 4 + ["listener"]
        theirs = stack.enter_context(call(listener, "links"))
        assert_connected(stack.enter_context(found.get(timeout=PATIENCE_S)[2]), theirs)


#: Runs out of descriptors for two seconds while a client calls, and serves it afterwards.
FULL = """
import contextlib, logging, os, resource, socket, sys, time
from dance_jax.models.connections import Connections, Credentials, Identity
logging.basicConfig(level=logging.WARNING, format="%(message)s")
listener = Connections(0, ("here", "there"), "127.0.0.1", Credentials(b"x", Identity("", "", "")))
host, port = listener.endpoint.split(":")
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
caller = socket.socket()
taken = []
with contextlib.suppress(OSError):
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
caller.connect((host, int(port)))
time.sleep(2)
for descriptor in taken:
    os.close(descriptor)
caller.settimeout(20)
caller.sendall(bytes(9 + 32))
assert len(caller.recv(64)) == 64
caller.close()
listener.close()
"""


def test_without_descriptors_it_says_so_once_a_second_and_goes_on():
    ended = subprocess.run([sys.executable, "-c", FULL], stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0, ended.stderr
    said = [line for line in ended.stderr.splitlines() if "Too many open files" in line]
    assert 1 <= len(said) <= 4, ended.stderr


def test_what_was_let_in_outlives_the_listener(listen: Callable[..., Connections]):
    listener = listen()
    found = arrivals(listener, "links")
    with call(listener, "links") as theirs, call(listener, "bell") as waiting:
        with found.get(timeout=PATIENCE_S)[2] as ours:
            listener.close()
            assert_connected(ours, theirs)
        assert_closed(waiting)
    with pytest.raises(RuntimeError, match=r"server here at .*refused"):
        call(listener, "links")


# All servers.


def of_all(listeners: list[Connections]) -> list:
    """The result of `mesh` on each server, or its exception."""

    def one(server: Connections):
        server.endpoints = [listener.endpoint for listener in listeners]
        try:
            return server.mesh("links")
        except RuntimeError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(listeners)) as pool:
        return list(pool.map(one, listeners))


def test_a_mesh_has_one_connection_for_each_pair(listen: Callable[..., Connections]):
    listeners = [listen(rank) for rank in range(3)]
    for _ in range(2):  # again, as after a restart
        found = of_all(listeners)
        with contextlib.ExitStack() as stack:
            for rank, connections_here in enumerate(found):
                assert connections_here.keys() == set(range(3)) - {rank}
                for connection in connections_here.values():
                    stack.enter_context(connection)
            for one, other in ((0, 1), (0, 2), (1, 2)):
                assert_connected(found[one][other], found[other][one])


def test_who_calls_again_while_others_are_waited_for_replaces_the_first(
    listen: Callable[..., Connections],
):
    listener = listen()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(listener.mesh, "links")
        with first_call(listener, "links") as early, call(listener, "links") as late:
            assert_closed(early)
            with call(listener, "links", rank=2) as other:
                found = waiting.result(PATIENCE_S)
                with found[1], found[2]:
                    assert_connected(found[1], late)
                    assert_connected(found[2], other)


def test_a_server_that_does_not_come_is_named(
    listen: Callable[..., Connections], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connections, "TIMEOUT_S", 0.5)
    listener = listen()
    with call(listener, "links") as theirs:
        with pytest.raises(RuntimeError, match=r"no connection from elsewhere in 0\.5 s"):
            listener.mesh("links")
        assert_closed(theirs)


def test_a_server_that_cannot_be_reached_is_named(listen: Callable[..., Connections]):
    listener, gone = listen(1), listen(0)
    gone.close()
    listener.endpoints = [gone.endpoint, listener.endpoint, ""]
    with pytest.raises(RuntimeError, match=f"server here at {gone.endpoint}: .*refused"):
        listener.mesh("links")


def test_all_are_dialled_and_again_when_one_has_restarted(listen: Callable[..., Connections]):
    """Server 1 dials two connections each: server 2 restarts at first, and server 0 later, which is
    then cut off for a while.
    """
    caller, here, elsewhere = listen(1), listen(0), listen(2)
    found, dialled = arrivals(here, "links"), queue.SimpleQueue()
    caller.endpoints = [here.endpoint, caller.endpoint, ""]
    caller.dial_all("links", 2, lambda *each: dialled.put(each))
    with pytest.raises(RuntimeError, match="server elsewhere at : it is not running"):
        caller.dial(2, "links")
    again = listen(0)
    cases = ((0, here, found), (2, elsewhere, None), (0, again, None), (0, again, None))
    for peer, server, at in cases:
        if at is None:
            at = arrivals(server, "links")
            caller.restarted(peer, server.endpoint)
        for index in range(2):
            rank, there, ours = dialled.get(timeout=PATIENCE_S)
            assert (rank, there) == (peer, index)
            with ours, at.get(timeout=PATIENCE_S)[2] as theirs:
                assert_connected(ours, theirs)
    assert dialled.empty()


def test_a_server_with_another_key_is_named(
    listen: Callable[..., Connections], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connections, "TIMEOUT_S", 0.5)
    here, there, _ = of_all([listen(0, credentials=ANOTHER), listen(1), listen(2)])
    assert "no connection from there, elsewhere" in str(here)
    assert "server here" in str(there) and "another key" in str(there)
