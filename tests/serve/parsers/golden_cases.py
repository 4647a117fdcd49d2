"""Outputs of models, and what they mean, from the JSON files in golden/."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from dance_jax.serve.parsers.formats import AnswerFormat
from dance_jax.serve.parsers.parsed import AnswerParser, Parsed

GOLDEN = pathlib.Path(__file__).parent / "golden"


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def deepseek(*texts: str) -> tuple[str, ...]:
    """Texts with the fullwidth bars of DeepSeek's special tokens."""
    return tuple(text.replace("|", "\uff5c") for text in texts)


TOOLS = [
    tool(
        "get_weather",
        city={"type": "string"},
        days={"type": "integer"},
        unit={"anyOf": [{"type": "string"}, {"type": "null"}]},
    ),
    tool("run", code={"type": "string"}, dry={"type": "boolean"}, env={"type": "object"}),
    tool("now"),
]


@dataclasses.dataclass
class Answer:
    """A whole answer. Calls are pairs of the name and the arguments' JSON text."""

    content: str
    reasoning: str
    calls: list[tuple[str, str]]


@dataclasses.dataclass
class GoldenCase:
    """An output of a model."""

    name: str
    format: AnswerFormat
    required: bool
    prompt: str
    text: str
    answer: Answer

    def parser(self) -> AnswerParser:
        tools = TOOLS if self.format.tools or self.required else None
        return self.format.parser(self.prompt, tools, required=self.required)

    def parse(self, pieces: Iterable[str]) -> Answer:
        return parsed(self.parser(), pieces)


def parsed(parser: AnswerParser, pieces: Iterable[str]) -> Answer:
    """What the parser makes of an output, with the rules that hold for all deltas checked."""
    total = Parsed()
    for piece in pieces:
        total.extend(parser.feed(piece))
    total.extend(parser.finish())
    calls: list[tuple[str, str]] = []
    for delta in total.calls:
        if delta.name is not None:
            assert delta.index == len(calls)
            calls.append((delta.name, ""))
        name, arguments = calls[delta.index]
        calls[delta.index] = (name, arguments + delta.arguments)
    return Answer(total.content, total.reasoning, calls)


def _cases(path: pathlib.Path) -> Iterable[GoldenCase]:
    contents = json.loads(path.read_text(encoding="utf-8"))
    for case in contents["cases"]:
        calls = [(call["name"], call["arguments"]) for call in case["calls"]]
        yield GoldenCase(
            f"{path.stem}: {case['name']}",
            AnswerFormat(contents["tools"], contents["reasoning"]),
            contents.get("required", False),
            case.get("prompt", ""),
            case["text"],
            Answer(case["content"], case["reasoning"], calls),
        )


CASES = [case for path in sorted(GOLDEN.glob("*.json")) for case in _cases(path)]
