"""Reasoning in `<think>` tags."""

from __future__ import annotations

import re

from dance_jax.serve.parsers.parsed import AnswerParser
from dance_jax.serve.parsers.reader import ReadingParser, Trimmed
from dance_jax.serve.parsers.source import Markers, Reading, Unread

#: Around reasoning.
TAGS = "<think>", "</think>"
_BEGIN, _END = TAGS
_END_MARKER = Markers(_END)
_LINE_BREAKS = re.compile(r"\n*")
#: The text up to the beginning of the answer, for `re.search`.
ANSWER_BEGINS = r"</think>\s*\Z"


def reasons(prompt: str) -> bool | None:
    """Whether the output begins with reasoning, which some prompts open and others close.

    None if the model decides.
    """
    end = prompt.rstrip()
    return True if end.endswith(_BEGIN) else False if end.endswith(_END) else None


class ThinkParser(ReadingParser):
    """Parses reasoning at the beginning of the output, and passes the rest on.

    White space around the reasoning and line breaks before the answer are dropped.

    Args:
        prompt: the rendered prompt, which may end with `<think>`.
        answer: parses what follows the reasoning.
    """

    def __init__(self, prompt: str, answer: AnswerParser) -> None:
        super().__init__()
        self._begun = reasons(prompt) is True
        self._answer = answer

    def steps(self) -> Reading[None]:
        instead = yield from self._opening()
        if instead is None or self._begun:
            reasoning = Trimmed(self._add_reasoning)
            reasoning.trim()
            reasoning.add(instead or "")
            yield from self.source.until(_END_MARKER, reasoning.add)
            yield from self.source.run(_LINE_BREAKS)
        else:
            self._pass_on(instead)
        yield from self.source.rest(self._pass_on)

    def complete(self) -> None:
        self.parsed.extend(self._answer.finish())

    def _opening(self) -> Reading[str | None]:
        """Read `<think>`. Returns None, or what was read instead of it."""
        self.source.keep()
        try:
            yield from self.source.space()
            yield from self.source.expect(_BEGIN)
        except Unread:
            return self.source.kept()
        self.source.forget()
        return None

    def _add_reasoning(self, text: str) -> None:
        self.parsed.reasoning += text

    def _pass_on(self, text: str) -> None:
        self.parsed.extend(self._answer.feed(text))
