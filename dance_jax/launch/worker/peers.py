"""Weights from other servers, for servers without a copy of the model (`checkpoint=peer`).

Any two servers have two connections, one for each direction of questions. One thread per peer
answers questions; the stepping thread is not involved. Weights requested while servers load come
from the model's files (`peer_weights`); experts that move come from the pool of a server that holds
them.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import math
import socket
import struct
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dance_jax.config import UserError
from dance_jax.launch.control.protocol import ExpertLoad
from dance_jax.launch.worker.loading import Read
from dance_jax.models.checkpoint import WeightSource
from dance_jax.models.connections import Connections
from dance_jax.models.experts import ExpertFormat, Weights

log = logging.getLogger("dance_jax.peers")

#: A question: kind, layer, and how many numbers follow. An answer: success, and how many bytes
#: follow: the arrays, or else the reason of the failure.
_QUESTION, _ANSWER = struct.Struct("<BII"), struct.Struct("<?Q")
#: Longest reason in bytes.
_LONGEST_REASON = 4096
#: Seconds for a peer to begin its answer, and between two parts of the answer.
ANSWER_TIMEOUT_S = 60.0

#: Shape and dtype of an array.
Like = tuple[tuple[int, ...], np.dtype]
#: Reads a resident expert from the pool: `Engine.expert`.
Held = Callable[[int, int], Weights]


class WeightKind(enum.IntEnum):
    """Source of the requested weights."""

    #: The pool: one expert of a layer.
    HELD = 0
    #: The model's files: experts of a layer, leaf by leaf of their format.
    EXPERTS = 1
    #: The model's files: weights of the trunk, by their positions in the order of their names.
    TRUNK = 2


@dataclasses.dataclass(frozen=True)
class WeightRequest:
    """Weights that one server requests from another."""

    kind: WeightKind
    #: MoE layer, counted from 0; 0 for the trunk.
    layer: int
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        if self.kind is WeightKind.TRUNK:
            return f"{len(self.numbers)} weights of the trunk"
        listed = ", ".join(map(str, self.numbers))
        return f"expert{'s' * (len(self.numbers) > 1)} {listed} of MoE layer {self.layer}"


#: Finds the requested weights; may raise any exception if it cannot.
Find = Callable[[WeightRequest], Iterable[np.ndarray]]


class Peers:
    """This server's connections to all others, for its own questions and for theirs.

    Connections are made on first use, and made again after a server restarts.

    Args:
        connections: of this server.
    """

    _TOPIC = "peers"

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._names = connections.names
        #: The latest connection for this server's questions, by endpoint, which changes when the
        #: other server restarts; and for the other's questions, by rank.
        self._asks: dict[str, socket.socket] = {}
        self._answers: dict[int, socket.socket] = {}

    @property
    def rank(self) -> int:
        """Rank of this server."""
        return self._connections.rank

    def answer(self, find: Find) -> None:
        """Answer questions from now on, in one thread per server.

        Args:
            find: called in these threads; an exception is sent as the answer.
        """

        def handler(peer: int, _: int, connection: socket.socket) -> None:
            self._answers[peer] = connection
            _answer(connection, find, self._names[peer])

        self._connections.handle(self._TOPIC, handler)

    def _connection(self, rank: int) -> socket.socket:
        """The connection for questions to a server.

        Raises:
            OSError: the server cannot be reached.
        """
        endpoint = self._connections.endpoints[rank]
        if endpoint not in self._asks:
            try:
                connection = self._connections.dial(rank, self._TOPIC)
            except RuntimeError as error:
                raise OSError(str(error)) from error
            connection.settimeout(ANSWER_TIMEOUT_S)
            self._asks[endpoint] = connection
        return self._asks[endpoint]

    def ask(self, rank: int, question: WeightRequest, likes: Sequence[Like]) -> list[np.ndarray]:
        """Ask a server; at most one question to each server may be in flight.

        Args:
            rank: of that server.
            question: the requested weights.
            likes: shapes and dtypes of the arrays in the answer.

        Raises:
            LookupError: the server does not have the weights.
            OSError: the server is gone or silent, or its answer does not fit the question.
        """
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in likes]
        name = self._names[rank]
        try:
            connection = self._connection(rank)
            connection.sendall(_packed(question))
            there, found = _ANSWER.unpack(_receive(connection, _ANSWER.size))
            if found != sum(sizes) if there else found > _LONGEST_REASON:
                raise OSError(f"{found} bytes announced, not {sum(sizes)}")
            content = _receive(connection, found)
        except OSError as error:
            # Reconnect next time: a late answer would be taken for the next one.
            if connection := self._asks.pop(self._connections.endpoints[rank], None):
                connection.close()
            raise OSError(f"server {name} did not send {question}: {error}") from error
        if not there:
            reason = content.decode(errors="replace")
            raise LookupError(f"server {name} cannot send {question}: {reason}")
        parts = np.split(np.frombuffer(content, np.uint8), np.cumsum(sizes)[:-1])
        return [
            part.view(dtype).reshape(shape)
            for part, (shape, dtype) in zip(parts, likes, strict=True)
        ]

    def reader(self, held: Held, form: ExpertFormat, files: WeightSource) -> Read:
        """Make a reader of moving experts, from the servers that hold them.

        Args:
            held: reads experts that this server holds.
            form: format of the pool.
            files: reads experts that no server holds from the servers with a copy of the model.
        """
        likes: list[Like] = [(leaf.shape, leaf.dtype) for leaf in form.leaves.values()]

        def one(load: ExpertLoad) -> tuple[Weights, int]:
            if load.holder == self.rank:
                return held(load.layer, load.expert), 0
            if load.holder < 0:
                ((_, weights),) = files.experts([(load.layer, load.expert)], form)
                return weights, form.bytes
            question = WeightRequest(WeightKind.HELD, load.layer, (load.expert,))
            return tuple(self.ask(load.holder, question, likes)), form.bytes

        def read(loads: Sequence[ExpertLoad]) -> tuple[list[Weights], int]:
            found = [one(load) for load in loads]
            return [weights for weights, _ in found], sum(size for _, size in found)

        return read

    def close(self) -> None:
        """Close all connections."""
        for connection in (*self._asks.values(), *self._answers.values()):
            connection.close()


def _answer(connection: socket.socket, find: Find, name: str) -> None:
    """Answer questions until the other end is gone."""
    try:
        while True:
            question = _next_question(connection)
            try:
                arrays = [np.ascontiguousarray(array) for array in find(question)]
            except Exception as error:
                reason = _reason(error)
                log.warning(
                    "server %s asked for %s, which cannot be sent: %s", name, question, reason
                )
                content = reason.encode()[:_LONGEST_REASON]
                connection.sendall(_ANSWER.pack(False, len(content)) + content)
                continue
            connection.sendall(_ANSWER.pack(True, sum(array.nbytes for array in arrays)))
            for array in arrays:
                # bfloat16 does not support the buffer protocol.
                connection.sendall(array.view(np.uint8).data)
    except (OSError, ValueError) as error:
        log.info("the connection of server %s ended: %s", name, error)
        connection.close()


def _packed(question: WeightRequest) -> bytes:
    numbers = np.array(question.numbers, "<u4").tobytes()
    return _QUESTION.pack(question.kind, question.layer, len(question.numbers)) + numbers


def _next_question(connection: socket.socket) -> WeightRequest:
    kind, layer, count = _QUESTION.unpack(_receive(connection, _QUESTION.size))
    numbers = np.frombuffer(_receive(connection, 4 * count), "<u4")
    return WeightRequest(WeightKind(kind), layer, tuple(numbers.tolist()))


def _reason(error: Exception) -> str:
    if isinstance(error, UserError | LookupError):
        return str(error.args[0] if error.args else error)
    return f"{type(error).__name__}: {error}"


def _receive(connection: socket.socket, count: int) -> bytearray:
    """Receive exactly `count` bytes.

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
