"""Connections between servers: who is let in."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

import pytest

from dance_jax.models import connections

NAMES = ("here", "there")
KEY = b"the secret of this launch"


def listen() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def address(listener: socket.socket) -> str:
    return "{}:{}".format(*listener.getsockname())


def join_both(keys: tuple[bytes, bytes], disturb: Callable[[str], None] = lambda where: None):
    """What `join` gave, or raised, on two servers."""
    with listen() as first, listen() as second:
        addresses = [address(first), address(second)]
        results: list = [None, None]

        def run(rank: int, listener: socket.socket) -> None:
            try:
                results[rank] = connections.join(rank, NAMES, listener, addresses, keys[rank])
            except RuntimeError as error:
                results[rank] = error

        waiting = threading.Thread(target=run, args=(0, first))
        waiting.start()
        disturb(addresses[0])
        run(1, second)
        waiting.join()
        return results


def test_two_who_know_the_key_are_connected():
    here, there = join_both((KEY, KEY))
    with here[1] as ours, there[0] as theirs:
        ours.sendall(b"x")
        assert theirs.recv(1) == b"x"


def test_another_key_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "TIMEOUT_S", 0.5)
    here, there = join_both((KEY, b"another"))
    assert "no connection from there" in str(here)
    assert "server here" in str(there) and "another key" in str(there)


def test_strangers_do_not_stop_the_others():
    """One says nothing, one hangs up, one talks of something else."""
    with contextlib.ExitStack() as stack:

        def disturb(where: str) -> None:
            host, port = where.split(":")
            for text in (b"", None, b"GET / HTTP/1.1\r\n\r\n" * 8):
                stranger = stack.enter_context(socket.create_connection((host, int(port))))
                if text is None:
                    stranger.close()
                else:
                    stranger.sendall(text)

        here, there = join_both((KEY, KEY), disturb)
        assert isinstance(here, dict) and isinstance(there, dict)
        here[1].close()
        there[0].close()


def test_a_server_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "TIMEOUT_S", 0.5)
    with listen() as gone, listen() as listener:
        nowhere = address(gone)
        gone.close()
        with pytest.raises(RuntimeError, match=f"server here at {nowhere}"):
            connections.join(1, NAMES, listener, [nowhere, address(listener)], KEY)
