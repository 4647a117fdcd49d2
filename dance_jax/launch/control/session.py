"""Numbered and acknowledged messages, which survive the loss of a connection.

ZeroMQ makes a lost connection again by itself, but what was under way on the old one is gone. A
`Session` at each end keeps every message until the other end has it. Within one connection, frames
arrive in order, so an end that hears of a later number than the one it expects knows that messages
are lost, and gets them again. Nothing is delivered twice or out of order.
"""

from __future__ import annotations

import collections
import enum
import struct
import time
from collections.abc import Callable

#: Start of every frame: kind, id of the sending end, id of the receiving end (0: not known yet),
#: number, and number of the latest message that the sender has received.
_HEAD = struct.Struct("<BQQQQ")
#: Most messages that are sent but not acknowledged; further messages wait in the session.
WINDOW = 1024
#: Messages after which a receiver acknowledges at once; fewer are acknowledged by `keep_up`.
ACKNOWLEDGE_EVERY = 64
#: Seconds between two frames that ask the other end what it has received; seconds in which the same
#: messages are not sent or asked for again.
ASK_S, REPEAT_S = 1.0, 0.5


class _Kind(enum.IntEnum):
    #: A message; `number` is its number, counted from 1.
    MESSAGE = 0
    #: "I have sent messages up to `number`": the other end answers with RECEIVED.
    SENT = 1
    #: "I know that you have sent messages up to `number`"; if `received` is lower, the messages
    #: between them are lost.
    RECEIVED = 2


class Session:
    """One end of a stream of messages in both directions; used by one thread at a time.

    Args:
        transmit: gives a frame, as head and content, to the connection without blocking; returns
            False if there is none. The connection may lose frames when it breaks, but it may not
            change their order.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        transmit: Callable[[bytes, bytes], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transmit, self._clock = transmit, clock
        #: Ids of both ends; a process that is started again has another id.
        self._own, self._peer = time.time_ns(), 0
        #: Messages that the other end may not have, in order.
        self._kept: collections.deque[bytes] = collections.deque()
        #: Numbers of the latest messages: acknowledged by the other end, and given to the
        #: connection.
        self._acknowledged = self._given = 0
        #: Number of the latest message received, and of the latest one that was acknowledged.
        self._received = self._told = 0
        #: Number of frames from the other end.
        self.heard = 0
        #: When this end last asked what the other end has, sent messages again, and reported a gap.
        self._asked = self._repeated = self._reported = float("-inf")

    @property
    def unacknowledged(self) -> int:
        """Number of messages that the other end may not have."""
        return len(self._kept)

    def send(self, content: bytes) -> None:
        """Send a message, now or as soon as the connection can take it."""
        self._kept.append(content)
        self._give()

    def receive(self, head: bytes, content: bytes) -> bytes | None:
        """Take in a frame.

        Returns:
            The content of the next message; None if the frame has none, or if the message was
            received before or must be sent again.

        Raises:
            ValueError: the frame is not one of a session.
        """
        try:
            kind, sender, receiver, number, received = _HEAD.unpack(head)
            kind = _Kind(kind)
        except struct.error as error:
            raise ValueError(f"the head has {len(head)} bytes, not {_HEAD.size}") from error
        if receiver not in (0, self._own):  # meant for a predecessor of this process
            self._frame(_Kind.RECEIVED, 0, receiver=sender)
            return None
        self.heard += 1
        if sender != self._peer:
            self._meet(sender)
        self._acknowledge(received)
        match kind:
            case _Kind.MESSAGE if number == self._received + 1:
                self._received = number
                if number - self._told >= ACKNOWLEDGE_EVERY:
                    self._tell(number)
                return content
            case _Kind.MESSAGE if number > self._received:
                if self._clock() - self._reported > REPEAT_S:
                    self._reported = self._clock()
                    self._tell(number)
            case _Kind.SENT:
                self._tell(number)
            case _Kind.RECEIVED if received < number and self._clock() - self._repeated > REPEAT_S:
                self._repeated = self._clock()
                self._given = self._acknowledged
        self._give()
        return None

    def keep_up(self) -> None:
        """Acknowledge, and look after messages without an acknowledgement; call once a second."""
        if self._told < self._received:
            self._tell(self._received)
        if self._kept and self._clock() - self._asked > ASK_S:
            self.ask()

    def ask(self) -> bool:
        """Ask the other end what it has received; returns False without a connection."""
        self._asked = self._clock()
        self._give()
        return self._frame(_Kind.SENT, self._given)

    def _meet(self, peer: int) -> None:
        """Begin a new stream with another process; what its predecessor should get is dropped."""
        if self._peer:
            self._kept.clear()
            self._acknowledged = self._given = 0
        self._peer, self._received, self._told = peer, 0, 0

    def _acknowledge(self, received: int) -> None:
        while self._kept and self._acknowledged < received:
            self._kept.popleft()
            self._acknowledged += 1
        self._given = max(self._given, self._acknowledged)

    def _give(self) -> None:
        """Give messages to the connection, as many as the window allows."""
        end = self._acknowledged + min(len(self._kept), WINDOW)
        while self._given < end:
            content = self._kept[self._given - self._acknowledged]
            if not self._frame(_Kind.MESSAGE, self._given + 1, content):
                break
            self._given += 1

    def _tell(self, number: int) -> None:
        if self._frame(_Kind.RECEIVED, number):
            self._told = self._received

    def _frame(
        self, kind: _Kind, number: int, content: bytes = b"", receiver: int | None = None
    ) -> bool:
        receiver = self._peer if receiver is None else receiver
        head = _HEAD.pack(kind, self._own, receiver, number, self._received)
        return self._transmit(head, content)
