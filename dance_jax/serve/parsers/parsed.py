"""What parsers make of a model's output."""

from __future__ import annotations

import dataclasses
from typing import Protocol


@dataclasses.dataclass
class CallDelta:
    """An addition to one tool call."""

    #: Number of the call in the answer, from 0.
    index: int
    #: Set in the first delta of a call only.
    name: str | None
    #: The next piece of the arguments' JSON text.
    arguments: str


@dataclasses.dataclass
class Parsed:
    """What a piece of output adds to the answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = dataclasses.field(default_factory=list)

    def extend(self, later: Parsed) -> None:
        """Append what a later piece adds."""
        self.content += later.content
        self.reasoning += later.reasoning
        self.calls += later.calls


class AnswerParser(Protocol):
    """Parses the output of one sample.

    How the output is cut into pieces does not change what the results add up to.
    """

    def feed(self, text: str) -> Parsed:
        """Parse the next piece of output."""
        ...

    def finish(self) -> Parsed:
        """Parse what was held back. Called once, when the output is complete or was cut off."""
        ...


class PlainParser:
    """Parses answers that are content only."""

    def feed(self, text: str) -> Parsed:
        return Parsed(content=text)

    def finish(self) -> Parsed:
        return Parsed()
