"""Text that arrives in pieces, read by generators.

A parser is a generator that reads one thing after the other, as if the whole text were there. It
yields whenever it needs more text. All reading takes time linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

_Result = TypeVar("_Result")
#: A step of a parser: yields to wait for more text, and returns what it read.
Reading = Generator[None, None, _Result]
#: Takes text, which is never empty.
Sink = Callable[[str], object]

_SPACE = re.compile(r"\s*")
#: Characters of the names of functions. Names of MCP servers have dots, colons and slashes.
_WORD = re.compile(r"""[^\s<>\[\]{}"'`,=]*""")
#: A JSON number or constant.
_SCALAR = re.compile(r"[^\s,{}\[\]]*")
_BRACKET_OR_QUOTE = re.compile(r'["{}\[\]]')
_END_OF_STRING_OR_ESCAPE = re.compile(r'["\\]')


class Unread(Exception):
    """The text does not go on as the format demands, or it has ended."""


class Markers:
    """Texts that are looked for at the same time."""

    def __init__(self, *markers: str) -> None:
        self.pattern = re.compile("|".join(map(re.escape, markers)))
        self._beginnings = {marker[:size] for marker in markers for size in range(1, len(marker))}
        self._longest = max(map(len, self._beginnings))

    def held(self, text: str, start: int) -> int:
        """Where the end of `text[start:]` begins that may become a marker."""
        first = max(start, len(text) - self._longest)
        ends = range(first, len(text))
        return next((at for at in ends if text[at:] in self._beginnings), len(text))


class Source:
    """The text of one sample, as far as it has arrived.

    The methods that return a `Reading` are used with `yield from`. They raise Unread if the text
    ends before they are done, unless they say otherwise.
    """

    def __init__(self) -> None:
        self._text = ""
        #: Everything before this place in the text has been read.
        self._at = 0
        self._ended = False
        #: Where the kept part of the text begins, and what was kept before the text.
        self._mark: int | None = None
        self._kept: list[str] = []

    def add(self, text: str) -> None:
        """Add the next piece."""
        if self._mark is not None:
            self._kept.append(self._text[self._mark : self._at])
            self._mark = 0
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """Say that no more text will arrive."""
        self._ended = True

    def keep(self) -> None:
        """Keep what is read from here on."""
        self._mark, self._kept = self._at, []

    def forget(self) -> None:
        """Forget what was kept, and keep nothing any more."""
        self._mark, self._kept = None, []

    def kept(self) -> str:
        """The text that was read since the last `keep`. Forgets it."""
        kept = "".join([*self._kept, self._text[self._mark : self._at]])
        self.forget()
        return kept

    def peek(self) -> Reading[str]:
        """The next character, without reading it."""
        while self._at == len(self._text):
            yield from self._more()
        return self._text[self._at]

    def space(self) -> Reading[None]:
        """Read white space, if any."""
        yield from self.run(_SPACE)

    def word(self) -> Reading[str]:
        """Read the name of a function; raises Unread if none comes next."""
        word = yield from self.run(_WORD)
        if not word:
            raise Unread
        return word

    def run(self, pattern: re.Pattern[str]) -> Reading[str]:
        """Read the longest run of characters. `pattern` matches every run, also the empty one."""
        pieces = []
        while True:
            match = pattern.match(self._text, self._at)
            assert match is not None
            pieces.append(self._take(match.end()))
            if self._at < len(self._text):
                return "".join(pieces)
            yield from self._more()

    def literal(self, *choices: str) -> Reading[str]:
        """Read one of `choices`, none of which begins like another. Returns "" if none comes next.

        If the text ends within one of them, this part is read, but "" is returned.
        """
        longest = max(map(len, choices))
        while True:
            ahead = self._text[self._at : self._at + longest]
            for choice in choices:
                if ahead.startswith(choice):
                    return self._take(self._at + len(choice))
            if not any(choice.startswith(ahead) for choice in choices):
                return ""
            if self._ended:
                self._take(len(self._text))
                return ""
            yield

    def expect(self, *choices: str) -> Reading[str]:
        """Read one of `choices`; raises Unread if none of them comes next."""
        found = yield from self.literal(*choices)
        if not found:
            raise Unread
        return found

    def until(self, markers: Markers, sink: Sink) -> Reading[str]:
        """Read a marker and pass on the text before it. Returns the marker.

        If there is none, all text is passed on before Unread is raised.
        """
        while True:
            match = markers.pattern.search(self._text, self._at)
            if match is not None:
                self._pass_on(match.start(), sink)
                return self._take(match.end())
            self._pass_on(markers.held(self._text, self._at), sink)
            if self._ended:
                self._pass_on(len(self._text), sink)
            yield from self._more()

    def rest(self, sink: Sink) -> Reading[None]:
        """Pass on all text as it arrives, then raise Unread."""
        while True:
            self._pass_on(len(self._text), sink)
            yield from self._more()

    def value(self, sink: Sink) -> Reading[None]:
        """Pass on a JSON value as it arrives. Only its strings and brackets are looked at."""
        if (yield from self.peek()) not in '"{[':
            scalar = yield from self.run(_SCALAR)
            if not scalar:
                raise Unread
            sink(scalar)
            return
        extent = _Extent()
        while True:
            self._pass_on(extent.advance(self._text, self._at), sink)
            if extent.complete:
                return
            yield from self._more()

    def _more(self) -> Reading[None]:
        """Wait for more text."""
        if self._ended:
            raise Unread
        yield

    def _take(self, end: int) -> str:
        taken = self._text[self._at : end]
        self._at = end
        return taken

    def _pass_on(self, end: int, sink: Sink) -> None:
        if end > self._at:
            sink(self._take(end))


class _Extent:
    """Finds the end of a JSON string, array or object that arrives in pieces."""

    def __init__(self) -> None:
        self.complete = False
        self._depth = 0
        self._in_string = False
        #: Whether the next character is the one after a backslash.
        self._escaped = False

    def advance(self, text: str, at: int) -> int:
        """Read `text` from `at` on. Returns where the value ends, or else where the text ends."""
        while at < len(text) and not self.complete:
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            pattern = _END_OF_STRING_OR_ESCAPE if self._in_string else _BRACKET_OR_QUOTE
            match = pattern.search(text, at)
            if match is None:
                return len(text)
            self._read(match.group())
            at = match.end()
        return at

    def _read(self, character: str) -> None:
        if character == "\\":
            self._escaped = True
            return
        if character == '"':
            self._in_string = not self._in_string
        else:
            self._depth += 1 if character in "{[" else -1
        self.complete = self._depth == 0 and not self._in_string
