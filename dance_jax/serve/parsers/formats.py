"""How models write their answers, and the parser for each way."""

from __future__ import annotations

import dataclasses
import itertools
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dance_jax.config import UserError
from dance_jax.serve.parsers import harmony, think
from dance_jax.serve.parsers.calls import CallParser
from dance_jax.serve.parsers.json_calls import (
    DeepSeekParser,
    HermesParser,
    JsonCalls,
    MistralParser,
)
from dance_jax.serve.parsers.parsed import AnswerParser, PlainParser
from dance_jax.serve.parsers.xml_calls import GlmParser, QwenXmlParser

Tools = Sequence[Mapping[str, Any]]

TOOL_FORMATS = ("hermes", "qwen_xml", "glm", "deepseek_v3", "mistral", "harmony")
REASONING_FORMATS = ("think", "harmony")

_CALL_PARSERS: dict[str, Callable[[Tools], CallParser]] = {
    "hermes": lambda _: HermesParser(),
    "qwen_xml": QwenXmlParser,
    "glm": GlmParser,
    "deepseek_v3": lambda _: DeepSeekParser(),
    "mistral": lambda _: MistralParser(),
}
#: What the chat templates of each format contain. The first that is found counts.
_TOOL_SIGNS = (
    ("harmony", re.compile(r"<\|channel\|>")),
    ("deepseek_v3", re.compile("tool▁call▁begin")),
    ("mistral", re.compile(r"\[TOOL_CALLS\]")),
    ("glm", re.compile("<tool_call>.*<arg_key>", re.DOTALL)),
    ("qwen_xml", re.compile("<tool_call>.*<parameter=", re.DOTALL)),
    # Quotes may be escaped, because the example stands in a string of the template.
    ("hermes", re.compile(r'<tool_call>.*"arguments\\?":', re.DOTALL)),
)
_REASONING_SIGNS = (
    ("harmony", re.compile(r"<\|channel\|>")),
    ("think", re.compile("</?think>")),
)
_CALL_BEGINS = {
    **dict.fromkeys(("hermes", "qwen_xml", "glm"), "<tool_call>"),
    "deepseek_v3": DeepSeekParser.begin_of_calls,
    "mistral": "[TOOL_CALLS]",
}
#: Formats of tools whose markers are special tokens.
_SPECIAL = ("mistral", "deepseek_v3", "harmony")


@dataclasses.dataclass(frozen=True)
class AnswerFormat:
    """How a model writes its answers.

    Args:
        tools: one of TOOL_FORMATS. None if the output is not searched for calls.
        reasoning: one of REASONING_FORMATS. None if reasoning is not told apart from content.

    Raises:
        UserError: a format is unknown, or one is harmony and the other is of another kind.
    """

    tools: str | None = None
    reasoning: str | None = None

    def __post_init__(self) -> None:
        _check("tool", self.tools, TOOL_FORMATS)
        _check("reasoning", self.reasoning, REASONING_FORMATS)
        if self.is_harmony and {self.tools, self.reasoning} - {"harmony", None}:
            raise UserError(
                f"tool format {self.tools} and reasoning format {self.reasoning} exclude each "
                "other: choose harmony, or none, for both"
            )

    @classmethod
    def detect(
        cls, template: str | None, tools: str = "auto", reasoning: str = "auto"
    ) -> AnswerFormat:
        """Choose the formats.

        Args:
            template: the source of the model's chat template. None if it has none.
            tools: a name of TOOL_FORMATS, "none", or "auto": what the template uses.
            reasoning: a name of REASONING_FORMATS, "none", or "auto" likewise.

        Raises:
            UserError: as for the class.
        """
        return cls(
            _chosen(template, tools, _TOOL_SIGNS), _chosen(template, reasoning, _REASONING_SIGNS)
        )

    @property
    def is_harmony(self) -> bool:
        return "harmony" in (self.tools, self.reasoning)

    @property
    def special_tokens(self) -> bool:
        """Whether markers are special tokens, so that decoding must not skip these."""
        return self.is_harmony or self.tools in _SPECIAL

    @property
    def call_begins(self) -> str | None:
        """The text with which an answer that only calls begins.

        None without such a text: no calls are looked for, or they have a channel of their own.
        """
        return _CALL_BEGINS.get(self.tools or "")

    def before_answer(self, prompt: str) -> dict[str, Any]:
        """Fields of `StructuredOutputsParams` for what comes before the answer to a prompt."""
        if self.is_harmony:
            return {"begins_after": harmony.ANSWER_BEGINS} if harmony.reasons(prompt) else {}
        if self.reasoning is None:
            return {}
        reasons = think.reasons(prompt)
        if reasons is None:
            return {"may_begin_with": list(think.TAGS)}
        return {"begins_after": think.ANSWER_BEGINS} if reasons else {}

    def call_id(self) -> str:
        """A fresh id for a call, of the form that the model's chat template wants."""
        unique = uuid.uuid4().hex
        return unique[:9] if self.tools == "mistral" else f"call_{unique[:24]}"

    def parser(
        self, prompt: str, tools: Tools | None, reasoning: bool = True, required: bool = False
    ) -> AnswerParser:
        """A parser for one sample.

        Args:
            prompt: the rendered prompt; reasoning may begin at its end.
            tools: the tools in OpenAI's form. None if the output is not searched for calls.
            reasoning: whether to tell reasoning apart; otherwise it is content.
            required: the answer after the reasoning is constrained to a JSON array of calls.
        """
        numbers = itertools.count()
        answer = JsonCalls(numbers) if required else PlainParser()
        if self.is_harmony:
            calls = self.tools is not None and tools is not None
            reasoning = reasoning and self.reasoning is not None
            return harmony.HarmonyParser(prompt, answer, calls, reasoning, numbers)
        if self.tools is not None and tools is not None and not required:
            answer = _CALL_PARSERS[self.tools](tools)
        if self.reasoning is not None and reasoning:
            return think.ThinkParser(prompt, answer)
        return answer


def _check(kind: str, name: str | None, known: tuple[str, ...]) -> None:
    if name is not None and name not in known:
        raise UserError(
            f"{kind} format {name!r} is unknown: choose auto, none, or one of {', '.join(known)}"
        )


def _chosen(
    template: str | None, name: str, signs: tuple[tuple[str, re.Pattern[str]], ...]
) -> str | None:
    if name != "auto":
        return None if name == "none" else name
    found = (each for each, sign in signs if sign.search(template or ""))
    return next(found, None)
