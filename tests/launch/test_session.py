"""Sessions over connections that break and are made again."""

from __future__ import annotations

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dance_jax.launch.control import session as sessions
from dance_jax.launch.control.session import Session

Frames = collections.deque[tuple[bytes, bytes]]


class Ends:
    """Two sessions, the frames under way between them, and what each end received."""

    def __init__(self) -> None:
        self.now = 0.0
        self.connected = True
        self.under_way: tuple[Frames, Frames] = (collections.deque(), collections.deque())
        self.sessions = self.new(0), self.new(1)
        self.received: tuple[list[bytes], list[bytes]] = ([], [])

    def new(self, end: int) -> Session:
        def transmit(head: bytes, content: bytes) -> bool:
            if self.connected:
                self.under_way[end].append((head, content))
            return self.connected

        return Session(transmit, lambda: self.now)

    def deliver(self, end: int, most: int = 1 << 30) -> None:
        """Deliver frames that this end sent."""
        for _ in range(min(most, len(self.under_way[end]))):
            content = self.sessions[1 - end].receive(*self.under_way[end].popleft())
            if content is not None:
                self.received[1 - end].append(content)

    def lose(self) -> None:
        for frames in self.under_way:
            frames.clear()

    def settle(self) -> None:
        self.connected = True
        for _ in range(12):
            self.now += 0.7
            for each in self.sessions:
                each.keep_up()
            while any(self.under_way):
                self.deliver(0)
                self.deliver(1)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 1), st.integers(1, 90)),
        st.tuples(st.just("deliver"), st.integers(0, 1), st.integers(1, 90)),
        st.tuples(st.sampled_from(["lose", "connect", "disconnect"]), st.just(0), st.just(0)),
        st.tuples(st.just("wait"), st.integers(0, 1), st.integers(1, 3)),
    ),
    max_size=40,
)


@given(STEPS)
def test_every_message_arrives_once_and_in_order(steps: list[tuple[str, int, int]]) -> None:
    ends = Ends()
    sent: tuple[list[bytes], list[bytes]] = ([], [])
    for what, end, count in steps:
        match what:
            case "send":
                for _ in range(count):
                    sent[end].append(b"%d" % len(sent[end]))
                    ends.sessions[end].send(sent[end][-1])
            case "deliver":
                ends.deliver(end, count)
            case "lose":
                ends.lose()
            case "connect" | "disconnect":
                ends.connected = what == "connect"
                ends.lose()
            case _:
                ends.now += count
                ends.sessions[end].keep_up()
    ends.settle()
    assert ends.received == (sent[1], sent[0])
    assert [each.unacknowledged for each in ends.sessions] == [0, 0]


def test_a_window_bounds_what_is_under_way() -> None:
    ends = Ends()
    for number in range(5 * sessions.WINDOW):
        ends.sessions[0].send(b"%d" % number)
    assert len(ends.under_way[0]) == sessions.WINDOW
    ends.settle()
    assert ends.received[1] == [b"%d" % number for number in range(5 * sessions.WINDOW)]


@pytest.mark.parametrize("replaced", [0, 1])
def test_a_process_that_starts_again_begins_a_new_stream(replaced: int) -> None:
    """What its predecessor should have got is dropped, also if nobody sends anything new."""
    ends = Ends()
    for end, each in enumerate(ends.sessions):
        each.send(b"to the other end %d" % end)
    ends.settle()
    ends.sessions[1 - replaced].send(b"for the predecessor")
    ends.lose()
    news = list(ends.sessions)
    news[replaced] = ends.new(replaced)
    ends.sessions = news[0], news[1]
    ends.sessions[replaced].send(b"hello")
    ends.settle()
    ends.sessions[1 - replaced].send(b"welcome")
    ends.settle()
    assert ends.received[1 - replaced][-1] == b"hello"
    assert ends.received[replaced][1:] == [b"welcome"]


def test_a_flood_of_questions_after_a_pause_repeats_messages_once() -> None:
    ends = Ends()
    ends.settle()
    for number in range(100):
        ends.sessions[0].send(b"%d" % number)
    ends.lose()
    for _ in range(40):
        ends.now += 1.1
        ends.sessions[0].keep_up()
    ends.deliver(0)
    ends.deliver(1)
    assert len(ends.under_way[0]) == 100


def test_other_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="3 bytes"):
        Session(lambda head, content: True).receive(b"abc", b"")
