"""The control channel admits peers with the launch's key, and loses no message of theirs."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Self

import pytest
import zmq

from dance_jax.launch.control import channel as control
from dance_jax.launch.control.channel import ControlConnection, ControlListener, new_key

KEY = new_key()
#: A long time for a message over loopback.
PATIENCE_S = 0.4


@pytest.fixture
def listener() -> Iterator[ControlListener]:
    listener = ControlListener(KEY, ["server-2", "127.0.0.1", "127.0.0.2"])
    yield listener
    listener.close()


def test_messages_go_both_ways(listener: ControlListener) -> None:
    server = ControlConnection(listener.private, KEY, "server-2")
    server.send(b"up")
    assert listener.receive(5) == [("server-2", b"up")]
    listener.send("server-2", b"down")
    assert server.receive() == b"down"
    server.close()


def test_it_listens_on_other_addresses_at_one_port(listener: ControlListener) -> None:
    port = listener.listen(["127.0.0.1", "127.0.0.2"], 0)
    for host in ("127.0.0.1", "127.0.0.2"):
        server = ControlConnection(f"tcp://{host}:{port}", KEY, host)
        server.send(b"hello")
        assert listener.receive(5) == [(host, b"hello")]
        server.close()
    with pytest.raises(OSError, match=r"192\.0\.2\.1"):
        listener.listen(["192.0.2.1"], 0)
    with pytest.raises(OSError, match=str(port)):
        listener.listen(["127.0.0.2"], port)


def test_another_key_is_refused(listener: ControlListener) -> None:
    stranger = ControlConnection(listener.private, new_key(), "server-2")
    stranger.send(b"let me in")
    assert not listener.receive(PATIENCE_S)
    stranger.close(0)


def test_a_sender_that_is_not_expected_is_counted(listener: ControlListener) -> None:
    other = ControlConnection(listener.private, KEY, "server-7")
    other.send(b"hello")
    assert not listener.receive(PATIENCE_S)
    assert listener.unknown == 1
    other.close(0)


def test_no_message_is_lost_when_connections_break(listener: ControlListener) -> None:
    """With messages under way in both directions, again and again."""
    with Breaker(int(listener.private.rpartition(":")[2])) as breaker:
        server = ControlConnection(f"tcp://127.0.0.1:{breaker.port}", KEY, "server-2")
        server.send(b"hello")
        assert listener.receive(5) == [("server-2", b"hello")]
        up, down = [b"%5000d" % n for n in range(600)], [b"%5000d" % n for n in range(600)]
        at_parent: list[bytes] = []
        at_server: list[bytes] = []
        for begin in range(0, 600, 200):
            for n in range(begin, begin + 200):
                if n % 200 == 100:
                    breaker.loses = True
                server.send(up[n])
                listener.send("server-2", down[n])
            time.sleep(0.05)
            breaker.break_all()
        deadline = time.monotonic() + 20
        while (at_parent, at_server) != (up, down) and time.monotonic() < deadline:
            at_parent += [content for _, content in listener.receive(0.01)]
            at_server += server.arrived()
        assert at_parent == up
        assert at_server == down
        server.close()


def test_a_server_connects_anew_when_its_connection_is_dead(
    listener: ControlListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a cut of the link, for as long as TCP waits before it tries again."""
    monkeypatch.setattr(control, "KEEP_UP_S", 0.02)
    with Breaker(int(listener.private.rpartition(":")[2])) as breaker:
        server = ControlConnection(f"tcp://127.0.0.1:{breaker.port}", KEY, "server-2")
        server.send(b"hello")
        assert listener.receive(5) == [("server-2", b"hello")]
        breaker.swallow()
        server.send(b"up")
        listener.send("server-2", b"down")
        deadline = time.monotonic() + 20
        at_parent: list[tuple[str, bytes]] = []
        at_server: list[bytes] = []
        while not (at_parent and at_server) and time.monotonic() < deadline:
            at_parent += listener.receive(0.01)
            at_server += server.arrived()
        assert at_parent == [("server-2", b"up")]
        assert at_server == [b"down"]
        server.close()


class Breaker:
    """Passes TCP connections on to a port; loses what is under way, then breaks them."""

    def __init__(self, port: int) -> None:
        #: Whether content is lost, until the next break.
        self.loses = False
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._swallowed: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.break_all()

    def break_all(self) -> None:
        ends, self._ends, self.loses = self._ends, [], False
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def swallow(self) -> None:
        """The connections of this moment stay, but pass nothing on any more."""
        self._swallowed |= {*self._ends}

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._ends += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError), source, target:
            while content := source.recv(1 << 16):
                if not self.loses and source not in self._swallowed:
                    target.sendall(content)


@pytest.mark.parametrize("curve", [False, True])
def test_a_stranger_is_refused(listener: ControlListener, curve: bool) -> None:
    """A peer without CURVE, and a peer that has only the parent's public key."""
    context = zmq.Context()
    end = context.socket(zmq.DEALER)
    if curve:
        end.curve_publickey, end.curve_secretkey = zmq.curve_keypair()
        end.curve_serverkey = control._curve_pair(KEY, "parent")[0]
    end.connect(listener.private)
    end.send(b"let me in")
    assert not listener.receive(PATIENCE_S)
    context.destroy(linger=0)


def test_secrets_of_different_uses_differ() -> None:
    assert control.derived(KEY, "links") != control.derived(KEY, "parent")
    assert control.derived(KEY, "links") == control.derived(KEY, "links")
    assert len({new_key() for _ in range(8)}) == 8
