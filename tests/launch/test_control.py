"""The control channel admits peers with the launch's key and refuses all others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq

from dance_jax.launch.control import channel as control
from dance_jax.launch.control.channel import ControlConnection, ControlListener, new_key

KEY = new_key()
#: A long time for a message over loopback.
PATIENCE_MS = 400


@pytest.fixture
def listener() -> Iterator[ControlListener]:
    listener = ControlListener(KEY)
    yield listener
    listener.close()


def test_messages_go_both_ways(listener: ControlListener) -> None:
    server = ControlConnection(listener.private, KEY, "server-2")
    server.socket.send(b"up")
    assert listener.socket.poll(5000)
    assert listener.socket.recv_multipart() == [b"server-2", b"up"]
    listener.socket.send_multipart([b"server-2", b"down"])
    assert server.socket.poll(5000)
    assert server.socket.recv() == b"down"
    server.close()


def test_it_listens_on_other_addresses_at_one_port(listener: ControlListener) -> None:
    port = listener.listen(["127.0.0.2", "127.0.0.3"], 0)
    for host in ("127.0.0.2", "127.0.0.3"):
        server = ControlConnection(f"tcp://{host}:{port}", KEY, host)
        server.socket.send(b"hello")
        assert listener.socket.poll(5000)
        assert listener.socket.recv_multipart() == [host.encode(), b"hello"]
        server.close()
    with pytest.raises(OSError, match=r"192\.0\.2\.1"):
        listener.listen(["192.0.2.1"], 0)
    with pytest.raises(OSError, match=str(port)):
        listener.listen(["127.0.0.2"], port)


def test_another_key_is_refused(listener: ControlListener) -> None:
    stranger = ControlConnection(listener.private, new_key(), "server-0")
    stranger.socket.setsockopt(zmq.LINGER, 0)
    stranger.socket.send(b"let me in")
    assert not listener.socket.poll(PATIENCE_MS)
    stranger.close()


@pytest.mark.parametrize("curve", [False, True])
def test_a_stranger_is_refused(listener: ControlListener, curve: bool) -> None:
    """A peer without CURVE, and a peer that has only the parent's public key."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    if curve:
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.curve_serverkey = control._curve_pair(KEY, "parent")[0]
    socket.connect(listener.private)
    socket.send(b"let me in")
    assert not listener.socket.poll(PATIENCE_MS)
    context.destroy(linger=0)


def test_secrets_of_different_uses_differ() -> None:
    assert control.derived(KEY, "links") != control.derived(KEY, "parent")
    assert control.derived(KEY, "links") == control.derived(KEY, "links")
    assert len({new_key() for _ in range(8)}) == 8
