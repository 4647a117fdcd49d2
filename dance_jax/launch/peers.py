"""Experts from the servers that hold them, for those without a copy of the model of their own
(`checkpoint=peer`).

Any two servers have two connections for it, one for the questions of either. Questions are answered
by a thread for each peer, from the pool; the thread that steps has no part in it.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
from collections.abc import Callable, Sequence

import numpy as np

from dance_jax.launch.control import derived
from dance_jax.launch.loading import Read, Weights
from dance_jax.launch.protocol import Load

log = logging.getLogger("dance_jax.peers")

#: MoE layer and expert that are asked for; bytes of the answer, 0: it is not there.
_QUESTION, _SIZE = struct.Struct("<II"), struct.Struct("<Q")
#: Seconds a peer has to go on with its answer.
ANSWER_TIMEOUT_S = 60.0

#: Reads a resident expert from the pool: `Engine.expert`.
Held = Callable[[int, int], Weights]


class Peers:
    """This server's connections to all others: those it asks on, and those it is asked on.

    Args:
        rank: this server's.
        names: of all servers, by rank.
        asks: connections for its questions, by the rank of the other end.
        answers: connections for the others' questions.
    """

    def __init__(
        self,
        rank: int,
        names: Sequence[str],
        asks: dict[int, socket.socket],
        answers: dict[int, socket.socket],
    ) -> None:
        self._rank, self._names = rank, names
        self._asks, self._answers = asks, answers
        for connection in asks.values():
            connection.settimeout(ANSWER_TIMEOUT_S)

    def answer(self, held: Held) -> None:
        """Answers questions from now on, in threads.

        Args:
            held: called there; raises KeyError for an expert that is not here.
        """
        for rank, connection in self._answers.items():
            connection.settimeout(None)
            arguments = (connection, held, self._names[rank])
            threading.Thread(
                target=_answer, args=arguments, daemon=True, name=f"peer-{rank}"
            ).start()

    def reader(self, held: Held, shapes: Sequence[tuple[int, ...]], dtype: np.dtype) -> Read:
        """Reads experts from the servers that hold them.

        Args:
            held: for those that are here.
            shapes: of an expert's three matrices.
            dtype: of the pool.
        """
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape in shapes]

        def one(load: Load) -> tuple[Weights, int]:
            if load.holder == self._rank:
                return held(load.layer, load.expert), 0
            content = self._ask(load, sum(sizes))
            parts = np.split(np.frombuffer(content, np.uint8), np.cumsum(sizes)[:-1])
            gate, up, down = (
                part.view(dtype).reshape(shape) for part, shape in zip(parts, shapes, strict=True)
            )
            return (gate, up, down), len(content)

        def read(loads: Sequence[Load]) -> tuple[list[Weights], int]:
            found = [one(load) for load in loads]
            return [weights for weights, _ in found], sum(size for _, size in found)

        return read

    def close(self) -> None:
        """Ends all connections."""
        for connection in (*self._asks.values(), *self._answers.values()):
            connection.close()

    def _ask(self, load: Load, size: int) -> bytearray:
        connection, name = self._asks[load.holder], self._names[load.holder]
        what = f"expert {load.expert} of MoE layer {load.layer}"
        try:
            connection.sendall(_QUESTION.pack(load.layer, load.expert))
            (found,) = _SIZE.unpack(_receive(connection, _SIZE.size))
            if found not in (0, size):
                raise OSError(f"{found} bytes announced, not {size}")
            content = _receive(connection, found)
        except OSError as error:
            # What may come late would be taken for the next answer.
            connection.close()
            raise OSError(f"server {name} did not send {what}: {error}") from error
        if not content:
            raise LookupError(f"server {name} does not hold {what}")
        return content


def _answer(connection: socket.socket, held: Held, name: str) -> None:
    """Until the other end is gone."""
    try:
        while True:
            layer, expert = _QUESTION.unpack(_receive(connection, _QUESTION.size))
            try:
                weights = held(layer, expert)
            except KeyError:
                connection.sendall(_SIZE.pack(0))
                continue
            connection.sendall(_SIZE.pack(sum(array.nbytes for array in weights)))
            for array in weights:
                # bfloat16 has no buffer of its own.
                connection.sendall(np.ascontiguousarray(array).view(np.uint8).data)
    except OSError as error:
        log.info("server %s asks no more: %s", name, error)


def _receive(connection: socket.socket, count: int) -> bytearray:
    """So many bytes.

    Raises:
        OSError: the other end is gone or silent.
    """
    content = bytearray(count)
    view = memoryview(content)
    while view:
        received = connection.recv_into(view)
        if received == 0:
            raise ConnectionError("it closed the connection")
        view = view[received:]
    return content


def meet(rank: int, names: Sequence[str], address: str, key: bytes) -> Peers:
    """Connects this server with all others; they do it at the same time.

    Args:
        rank: this server's.
        names: of all servers, by rank.
        address: of this server, where the others reach it.
        key: the launch's.

    Raises:
        RuntimeError: a server cannot be reached, or is a stranger.
    """
    up, down = (_mesh(rank, names, address, key, topic) for topic in ("peers-up", "peers-down"))
    asks = {peer: (up if peer > rank else down)[peer] for peer in up}
    answers = {peer: (down if peer > rank else up)[peer] for peer in up}
    return Peers(rank, names, asks, answers)


def _mesh(
    rank: int, names: Sequence[str], address: str, key: bytes, topic: str
) -> dict[int, socket.socket]:
    # Not above: it brings JAX along.
    from dance_jax.models.connections import join, publish

    family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server((address, 0), family=family) as listener:
        host, port = listener.getsockname()[:2]
        addresses = publish(topic, rank, f"{host}:{port}", names)
        return join(rank, names, listener, addresses, derived(key, topic))
