"""Weights from other servers, for those without a copy of the model of their own
(`checkpoint=peer`).

Any two servers have two connections for it, one for the questions of either. Questions are answered
by a thread for each peer; the thread that steps has no part in it. What is asked for while servers
load comes from the model's files (`peer_weights`), experts that move come from the pool of a server
that holds them.
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
from dance_jax.models.connections import Key, PeerListener, dial
from dance_jax.models.experts import ExpertFormat, Weights

log = logging.getLogger("dance_jax.peers")

#: A question: its kind, the layer, and how many numbers follow it. The answer: all is well, and
#: bytes of what follows: the arrays, or else why there are none.
_QUESTION, _ANSWER = struct.Struct("<BII"), struct.Struct("<?Q")
#: Bytes of the longest reason.
_LONGEST_REASON = 4096
#: Seconds a peer has to begin its answer, and to go on with it.
ANSWER_TIMEOUT_S = 60.0

#: Shape and dtype of an array.
Like = tuple[tuple[int, ...], np.dtype]
#: Reads a resident expert from the pool: `Engine.expert`.
Held = Callable[[int, int], Weights]


class WeightKind(enum.IntEnum):
    """Where the answer to a question comes from."""

    #: The pool: one expert of a layer.
    HELD = 0
    #: The model's files: experts of a layer, leaf by leaf of their format.
    EXPERTS = 1
    #: The model's files: weights of the trunk, by their positions in the order of their names.
    TRUNK = 2


@dataclasses.dataclass(frozen=True)
class WeightRequest:
    """What one server wants of another."""

    kind: WeightKind
    #: MoE layer counted from 0; 0 where it is about the trunk.
    layer: int
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        if self.kind is WeightKind.TRUNK:
            return f"{len(self.numbers)} weights of the trunk"
        listed = ", ".join(map(str, self.numbers))
        return f"expert{'s' * (len(self.numbers) > 1)} {listed} of MoE layer {self.layer}"


#: Finds what is asked for; raises whatever it likes where it cannot.
Find = Callable[[WeightRequest], Iterable[np.ndarray]]


class Peers:
    """This server's connections to all others: those it asks on, and those it is asked on.

    Each is made when it is first needed, and anew where a server has been restarted.

    Args:
        rank: this server's.
        names, endpoints: of all servers, by rank; an endpoint may change.
        listener: this server's.
        key: of the servers.
    """

    _TOPIC = "peers"

    def __init__(
        self,
        rank: int,
        names: Sequence[str],
        listener: PeerListener,
        endpoints: list[str],
        key: Key,
    ) -> None:
        self.rank = rank
        self._names, self._listener, self._key = names, listener, key
        self._endpoints = endpoints
        #: The latest connection with each server, for this one's questions, and for the others'.
        self._asks: dict[int, socket.socket] = {}
        self._answers: dict[int, socket.socket] = {}

    def answer(self, find: Find) -> None:
        """Answers questions from now on, each server's in a thread.

        Args:
            find: called there; what it raises is the answer.
        """

        def admit(peer: int, _: int, connection: socket.socket) -> None:
            self._answers[peer] = connection
            _answer(connection, find, self._names[peer])

        self._listener.on(self._TOPIC, admit)

    def _connection(self, rank: int) -> socket.socket:
        """For questions to a server.

        Raises:
            OSError: it cannot be reached.
        """
        if rank not in self._asks:
            try:
                self._asks[rank] = dial(
                    self.rank,
                    rank,
                    self._names[rank],
                    self._endpoints[rank],
                    self._key,
                    self._TOPIC,
                )
            except RuntimeError as error:
                raise OSError(str(error)) from error
            self._asks[rank].settimeout(ANSWER_TIMEOUT_S)
        return self._asks[rank]

    def ask(self, rank: int, question: WeightRequest, likes: Sequence[Like]) -> list[np.ndarray]:
        """Asks one server; only one question may be on the way to each.

        Args:
            rank: of that server.
            question: what is wanted.
            likes: of the arrays that the answer has.

        Raises:
            LookupError: it has them not.
            OSError: it is gone or silent, or answers something else.
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
            # What may come late would be taken for the next answer.
            if rank in self._asks:
                self._asks.pop(rank).close()
            raise OSError(f"server {name} did not send {question}: {error}") from error
        if not there:
            reason = content.decode(errors="replace")
            raise LookupError(f"server {name} cannot send {question}: {reason}")
        parts = np.split(np.frombuffer(content, np.uint8), np.cumsum(sizes)[:-1])
        return [
            part.view(dtype).reshape(shape)
            for part, (shape, dtype) in zip(parts, likes, strict=True)
        ]

    def reader(self, held: Held, form: ExpertFormat) -> Read:
        """Reads experts that move, from the servers that hold them.

        Args:
            held: for those that are here.
            form: of the pool.
        """
        likes: list[Like] = [(leaf.shape, leaf.dtype) for leaf in form.leaves.values()]

        def one(load: ExpertLoad) -> tuple[Weights, int]:
            if load.holder == self.rank:
                return held(load.layer, load.expert), 0
            question = WeightRequest(WeightKind.HELD, load.layer, (load.expert,))
            return tuple(self.ask(load.holder, question, likes)), form.bytes

        def read(loads: Sequence[ExpertLoad]) -> tuple[list[Weights], int]:
            found = [one(load) for load in loads]
            return [weights for weights, _ in found], sum(size for _, size in found)

        return read

    def close(self) -> None:
        """Ends all connections."""
        for connection in (*self._asks.values(), *self._answers.values()):
            connection.close()


def _answer(connection: socket.socket, find: Find, name: str) -> None:
    """Until the other end is gone."""
    try:
        while True:
            question = _next_question(connection)
            try:
                arrays = [np.ascontiguousarray(array) for array in find(question)]
            except Exception as error:
                reason = _reason(error)
                log.warning("server %s wants %s: %s", name, question, reason)
                content = reason.encode()[:_LONGEST_REASON]
                connection.sendall(_ANSWER.pack(False, len(content)) + content)
                continue
            connection.sendall(_ANSWER.pack(True, sum(array.nbytes for array in arrays)))
            for array in arrays:
                # bfloat16 has no buffer of its own.
                connection.sendall(array.view(np.uint8).data)
    except (OSError, ValueError) as error:
        log.info("server %s asks no more: %s", name, error)
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
