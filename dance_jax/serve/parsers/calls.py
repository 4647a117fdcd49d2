"""The base of parsers of tool calls in content."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from dance_jax.serve.parsers.parsed import CallDelta
from dance_jax.serve.parsers.reader import ReadingParser, Trimmed
from dance_jax.serve.parsers.source import Markers, Reading, Unread


class CallParser(ReadingParser):
    """Parses content in which markers begin tool calls.

    What looks like a call, but is malformed before its name is known, is content, up to the place
    where it is malformed. If a call is malformed later, what follows is content. White space next
    to a call is dropped.

    Args:
        numbers: the numbers of the calls; from 0 if not given.
    """

    #: The markers with which calls begin.
    openings: ClassVar[Markers]

    def __init__(self, numbers: Iterator[int] | None = None) -> None:
        super().__init__()
        self._numbers = itertools.count() if numbers is None else numbers
        self._number = 0
        self._content = Trimmed(self._add_content)
        #: What to give out as content if no call follows. None once the call has begun.
        self._opening: str | None = None

    @abstractmethod
    def call(self, opening: str) -> Reading[None]:
        """Read a call, or several, after `opening`.

        It calls `begin` as soon as the name is known, then `add_arguments`. It raises Unread where
        the text is malformed.
        """

    def steps(self) -> Reading[None]:
        while True:
            opening = yield from self.source.until(self.openings, self._content.add)
            yield from self.attempt(opening)

    def complete(self) -> None:
        self._content.release()

    def attempt(self, opening: str) -> Reading[None]:
        """Read a call after `opening`. If it is none, it is content."""
        self.open(opening)
        try:
            yield from self.call(opening)
        except Unread:
            if self._opening is not None:
                self._content.add(self._opening + self.source.kept())
        self.source.forget()

    def open(self, opening: str = "") -> None:
        """Prepare for a call that may turn out to be none."""
        self.source.keep()
        self._opening = opening

    def begin(self, name: str) -> None:
        """Begin a call; from here on it stays a call, whatever follows."""
        self.source.forget()
        self._opening = None
        self._content.trim()
        self._number = next(self._numbers)
        self.parsed.calls.append(CallDelta(self._number, name, ""))

    def add_arguments(self, text: str) -> None:
        """Add text to the call that was begun last."""
        self.parsed.calls.append(CallDelta(self._number, None, text))

    def _add_content(self, text: str) -> None:
        self.parsed.content += text
