"""The base of parsers that are written as generators."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod

from dance_jax.serve.parsers.parsed import Parsed
from dance_jax.serve.parsers.source import Reading, Sink, Source, Unread


class ReadingParser(ABC):
    """Runs `steps` as far as the text allows, and returns what it has added to `parsed`."""

    def __init__(self) -> None:
        self.source = Source()
        #: What was read since the last `feed`.
        self.parsed = Parsed()
        self._steps = self.steps()

    @abstractmethod
    def steps(self) -> Reading[None]:
        """Read the whole output. Unread may be raised once the text has ended."""

    def feed(self, text: str) -> Parsed:
        self.source.add(text)
        next(self._steps)
        return self._take()

    def finish(self) -> Parsed:
        self.source.end()
        with contextlib.suppress(Unread):
            next(self._steps, None)
        self.complete()
        return self._take()

    @abstractmethod
    def complete(self) -> None:
        """Add what `steps` has held back, once it has ended."""

    def _take(self) -> Parsed:
        parsed, self.parsed = self.parsed, Parsed()
        return parsed


class Trimmed:
    """Passes text on, but holds back white space at its end, which may have to be dropped."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._held: list[str] = []
        self._at_start = False

    def add(self, text: str) -> None:
        if self._at_start:
            text = text.lstrip()
        if not text:
            return
        self._at_start = False
        body = text.rstrip()
        if body:
            self.release()
            self._sink(body)
        self._held.append(text[len(body) :])

    def trim(self) -> None:
        """Drop the white space here, before and after."""
        self._held.clear()
        self._at_start = True

    def release(self) -> None:
        """Pass on what is held back."""
        held = "".join(self._held)
        self._held.clear()
        if held:
            self._sink(held)
