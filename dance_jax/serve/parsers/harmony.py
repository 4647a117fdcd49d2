"""Harmony, the format of gpt-oss: reasoning, calls and content are messages in channels.

The text is parsed here, and not by the package openai-harmony. The package downloads its vocabulary
at first use, and it only knows the token ids of the original checkpoints.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from dance_jax.serve.parsers.parsed import AnswerParser, CallDelta
from dance_jax.serve.parsers.reader import ReadingParser
from dance_jax.serve.parsers.source import Markers, Reading, Sink

_START = "<|start|>"
_END_OF_HEADER = Markers("<|message|>")
#: A message can also end with the header of the next.
_END_OF_MESSAGE = Markers("<|end|>", "<|call|>", "<|return|>", _START)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\sto=([^\s<]+)")
_IN_FINAL = re.compile(r"<\|channel\|>final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
#: The text up to the beginning of the answer, for `re.search`.
ANSWER_BEGINS = _IN_FINAL.pattern + r"\Z"


def reasons(prompt: str) -> bool:
    """Whether reasoning or a header comes before the answer, or the output goes on with it."""
    return not _IN_FINAL.search(_last_message(prompt))


def _last_message(prompt: str) -> str:
    """The last message of a prompt, which the output goes on with."""
    _, start, message = prompt.rpartition(_START)
    return start and message


class HarmonyParser(ReadingParser):
    """Parses messages: a header, with a channel and perhaps a recipient, and a text.

    A message to a recipient is a call, whatever its channel. Other messages are reasoning if they
    are in the channel `analysis`, and else content. A line break separates two of the same kind.

    Args:
        prompt: the rendered prompt, which ends within a message, mostly in its header.
        answer: parses the content, of all messages in a row.
        calls: whether to look for calls; otherwise they are content.
        reasoning: whether to look for reasoning; otherwise it is content.
        numbers: the numbers of the calls; from 0 if not given.
    """

    def __init__(
        self,
        prompt: str,
        answer: AnswerParser,
        calls: bool,
        reasoning: bool,
        numbers: Iterator[int] | None = None,
    ) -> None:
        super().__init__()
        self._answer = answer
        self._calls = calls
        self._reasoning = reasoning
        self._numbers = itertools.count() if numbers is None else numbers
        self._number = 0
        #: Kinds of text that the output has had so far.
        self._kinds: set[str] = set()
        # What stands in the prompt is no part of the output.
        self.feed(_last_message(prompt))

    def steps(self) -> Reading[None]:
        while True:
            header: list[str] = []
            yield from self.source.until(_END_OF_HEADER, header.append)
            yield from self.source.until(_END_OF_MESSAGE, self._sink("".join(header)))

    def complete(self) -> None:
        self.parsed.extend(self._answer.finish())

    def _sink(self, header: str) -> Sink:
        """Where the text of a message goes."""
        recipient = _RECIPIENT.search(header)
        if recipient and self._calls:
            return self._begin_call(recipient[1].removeprefix("functions."))
        channel = _CHANNEL.search(header)
        reasons = self._reasoning and channel is not None and channel[1] == "analysis"
        return self._begin_text("reasoning" if reasons else "content")

    def _begin_call(self, name: str) -> Sink:
        self._number = next(self._numbers)
        self.parsed.calls.append(CallDelta(self._number, name, ""))
        return self._add_arguments

    def _begin_text(self, kind: str) -> Sink:
        sink = self._add_reasoning if kind == "reasoning" else self._add_content
        if kind in self._kinds:
            sink("\n")
        self._kinds.add(kind)
        return sink

    def _add_arguments(self, text: str) -> None:
        self.parsed.calls.append(CallDelta(self._number, None, text))

    def _add_reasoning(self, text: str) -> None:
        self.parsed.reasoning += text

    def _add_content(self, text: str) -> None:
        self.parsed.extend(self._answer.feed(text))
