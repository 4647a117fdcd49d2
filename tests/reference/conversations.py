"""Conversations that templates/*.jinja render, in the form of OpenAI's API and of transformers."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
from typing import Any

Message = dict[str, Any]

#: What `strftime_now` tells while texts are made and compared.
NOW = datetime.datetime(2025, 3, 9, 8, 5, 7)
#: Special tokens of the tokenizer.
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

#: Templates that join the arguments of calls with other text, so that they want them as text.
OF_TEXT = {"deepseek_r1", "deepseek_v3"}
#: Templates that show calls only if the content is null.
OF_NULL = {"deepseek_r1"}
#: Templates that take content as a list of parts.
OF_PARTS = {"gemma", "gemma4", "glm4_5", "kimi_k2", "minimax_m2", "qwen3_5"}
#: Templates that know developers; for others a developer is the system.
OF_DEVELOPERS = {"constructs", "gemma4", "gpt_oss"}

#: Characters that HTML, JSON or Jinja would escape, or that are not in ASCII.
ODD = "Ünï «👍🏽» <b>&amp;</b> 'one' \"two\" \\n {{ x }} {% y %}\tend"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather in a city, now & later.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name, e.g. Orléans"},
                "unit": {"type": "string", "enum": ["°C", "°F"], "default": "°C"},
                "days": {"type": "integer", "default": 1},
            },
            "required": ["city"],
        },
    },
}
SEARCH: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Finds texts where a < b.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "words": {"type": "array", "items": {"type": "string"}, "description": "'any'"},
                "sizes": {"type": "array", "items": {"type": "integer"}},
                "pairs": {"type": "array", "items": {"type": "object", "properties": {}}},
                "exact": {"type": "boolean", "default": False},
                "where": {
                    "type": "object",
                    "properties": {
                        "from": {"type": "number"},
                        "to": {"type": "string", "nullable": True},
                    },
                    "required": ["from"],
                },
                "kind": {"type": ["string", "null"]},
                "order": {
                    "oneOf": [{"type": "string", "description": "a"}, {"type": "number"}],
                    "default": "up",
                },
            },
        },
    },
}
BARE: dict[str, Any] = {"type": "function", "function": {"name": "clock", "description": ODD}}
NOTHING = {"type": "object", "properties": {}}
CLOCK = {"type": "function", "function": BARE["function"] | {"parameters": NOTHING}}
TOOLS = [WEATHER, SEARCH]
#: Arguments of every type that JSON has.
ARGUMENTS: dict[str, Any] = {
    "words": ["é", "a & b"],
    "sizes": [1, 2.5],
    "exact": True,
    "where": {"from": -3, "to": None},
    "kind": None,
    "text": ODD,
}


def call(name: str, arguments: Any, number: int = 0) -> Message:
    """A call with an id of nine characters, which Mistral's templates want."""
    function = {"name": name, "arguments": arguments}
    return {"id": f"call0000{number}", "type": "function", "function": function}


def result(content: Any, number: int = 0) -> Message:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "content": content}


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def assistant(content: Any, *calls: Message, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more} | (
        {"tool_calls": [*calls]} if calls else {}
    )


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages with the fields of OpenAI's API, and the template's other variables."""

    messages: list[Message]
    variables: dict[str, Any] = dataclasses.field(default_factory=dict)


def _of(*messages: Message, **variables: Any) -> Conversation:
    return Conversation([*messages], variables)


TURNS = [user("How warm is it?"), assistant("Where?"), user("In Orléans.")]
#: Two calls at once, and what they gave. Models write arguments with spaces and without.
CALLS = [
    user("Warm there?"),
    assistant(
        None, call("weather", '{"city":"Orléans"}', 1), call("weather", '{"city": "Öre"}', 2)
    ),
    result("21 °C", 1),
    result('{"now": "<5 °C"}', 2),
]
CONVERSATIONS = {
    "question": _of(user("Hello?")),
    "turns": _of(*TURNS),
    "system and turns": _of(system("Be brief."), *TURNS),
    "no generation prompt": _of(
        system("Be brief."), *TURNS, assistant("It is."), add_generation_prompt=False
    ),
    "a user comes last without a generation prompt": _of(*TURNS, add_generation_prompt=False),
    "two systems": _of(system("Be brief."), user("Hello?"), system("Be kind."), user("Well?")),
    "developer": _of({"role": "developer", "content": "Be brief."}, *TURNS),
    "developer and tools": _of(
        {"role": "developer", "content": "Be brief."}, *CALLS, tools=[WEATHER]
    ),
    "tools": _of(user("Warm there?"), tools=TOOLS),
    "tools and system": _of(system("Be brief."), *TURNS, tools=[WEATHER]),
    "no tools": _of(*TURNS, tools=[]),
    "a tool without parameters": _of(user("Late?"), tools=[BARE]),
    "calls": _of(*CALLS, tools=[WEATHER]),
    "a call": _of(*CALLS[:1], assistant(None, CALLS[1]["tool_calls"][0]), result("21", 1)),
    "calls with content": _of(
        system("Be brief."),
        *CALLS[:1],
        assistant("I look.", *CALLS[1]["tool_calls"]),
        *CALLS[2:],
        tools=[WEATHER],
    ),
    "arguments as objects": _of(
        *CALLS[:1], assistant("", call("search", ARGUMENTS)), result("nothing"), tools=TOOLS
    ),
    "arguments as text": _of(
        *CALLS[:1],
        assistant("", call("search", json.dumps(ARGUMENTS, ensure_ascii=False))),
        result("nothing"),
    ),
    "arguments with escapes": _of(
        *CALLS[:1], assistant("", call("search", json.dumps(ARGUMENTS))), result("nothing")
    ),
    "no arguments": _of(user("Late?"), assistant("", call("clock", "{}")), result("8:05")),
    "calls and an answer": _of(
        *CALLS, assistant("Only in Orléans."), user("And in Öre?"), tools=[WEATHER]
    ),
    "calls in two steps": _of(
        *CALLS,
        assistant("", call("search", '{"words": []}', 3), reasoning_content="More is needed."),
        result("nothing", 3),
        tools=[WEATHER],
    ),
    "calls that are thought about": _of(
        user("Warm?"),
        assistant(None, call("weather", '{"city": "Öre"}'), reasoning_content="I look.\n"),
        result("5"),
        tools=[WEATHER],
    ),
    "calls with content and thought": _of(
        user("Warm?"),
        assistant("I look.", call("weather", '{"city": "Öre"}'), reasoning_content="Öre?"),
        result("5"),
        tools=[WEATHER],
    ),
    "different calls": _of(
        user("Warm and late?"),
        assistant("", call("weather", '{"city": "Öre"}', 1), call("clock", "{}", 2)),
        result("5", 1),
        result("8:05", 2),
        tools=[WEATHER, CLOCK],
    ),
    "long ids": _of(
        user("Late?"),
        assistant(None, call("clock", "{}") | {"id": "call_of_clock"}),
        {"role": "tool", "tool_call_id": "call_of_clock", "content": "8:05"},
    ),
    "odd characters": _of(system(ODD), user(ODD), assistant(ODD), user(ODD), tools=[CLOCK]),
    "spaces and lines": _of(system(" a\n"), user("\n b\n\n"), assistant(" c \n"), user("\td ")),
    "odd result": _of(user("?"), assistant("", call("clock", "{}")), result(ODD + "\n")),
    "thought in a field": _of(
        user("6 x 7?"), assistant("42", reasoning_content="\n6 x 7 = 42\n"), user("Sure?")
    ),
    "thought in the last answer": _of(
        user("6 x 7?"),
        assistant("42", reasoning_content="6 x 7 = 42"),
        add_generation_prompt=False,
    ),
    "thought in content": _of(
        user("6 x 7?"), assistant("<think>\n6 x 7 = 42\n</think>\n\n42"), user("Sure?")
    ),
    "thought in the last content": _of(
        user("6 x 7?"), assistant("<think>\nhm\n</think>\n\n42"), add_generation_prompt=False
    ),
    "thought as vLLM names it": _of(
        user("6 x 7?"), assistant("42", reasoning="6 x 7 = 42"), add_generation_prompt=False
    ),
    "thought as gpt-oss names it": _of(
        user("6 x 7?"), assistant("42", thinking="6 x 7 = 42"), add_generation_prompt=False
    ),
    "no thinking": _of(*TURNS, enable_thinking=False, thinking=False),
    "thinking": _of(*TURNS, enable_thinking=True, thinking=True),
    "documents": _of(
        user("Who?"),
        documents=[{"title": "A", "text": "a <\nb"}, {"doc_id": 7, "title": "é", "text": "'c'"}],
    ),
    "documents and tools": _of(
        user("Who?"), documents=[{"title": "A", "text": "a"}], tools=[WEATHER]
    ),
    "other variables": _of(
        user("Who?"),
        model_identity="You are N.",
        reasoning_effort="high",
        builtin_tools=["python", "browser"],
        controls={"tone": "kind", "length": "<short>"},
    ),
    "null fields": _of(
        user("Hello?") | {"name": None},
        assistant(
            "Yes.",
            refusal=None,
            audio=None,
            function_call=None,
            tool_calls=None,
            reasoning_content=None,
            thinking=None,
        ),
        user("Well?"),
    ),
    "a name": _of(user("Hello?") | {"name": "Ann"}),
    "empty content": _of(system(""), user(""), assistant(""), user("Well?")),
    "two users": _of(user("Hello?"), user("Well?")),
    "an assistant begins": _of(assistant("Hello."), user("Well?")),
    "a result without a call": _of(user("Hello?"), result("5")),
    "an unknown role": _of(user("Hello?"), {"role": "critic", "content": "Bad."}),
    "a part": _of(system([part("Be brief.")]), user([part("Hello?")])),
    "parts": _of(
        user([part(" One "), part("two.")]), assistant("Yes."), user([part("3"), part("4")])
    ),
    "an answer that goes on": _of(*TURNS, assistant("In Orl"), continue_final_message=True),
    "an answer that goes on after a space": _of(
        *TURNS, assistant("It is "), continue_final_message=True
    ),
    "an answer that goes on after a thought": _of(
        user("6 x 7?"), assistant("<think>\nhm\n</think>\n\n4"), continue_final_message=True
    ),
    "an answer that repeats the question": _of(
        user("4"), assistant("4"), user("4"), assistant("4"), continue_final_message=True
    ),
}


def for_transformers(messages: list[Message], template: str) -> list[Message]:
    """Messages as a user of transformers would give them to this template.

    Args:
        messages: with the fields of OpenAI's API.
        template: name of a file in templates, without .jinja.
    """
    made = []
    for message in copy.deepcopy(messages):
        content = message.get("content")
        fields = {name: value for name, value in message.items() if value is not None}
        fields["content"] = _content(content, template)
        if template in OF_NULL and "tool_calls" in fields and not content:
            fields["content"] = None
        if message["role"] == "developer" and template not in OF_DEVELOPERS:
            fields["role"] = "system"
        for called in fields.get("tool_calls", ()):
            function = called["function"]
            function["arguments"] = _arguments(function["arguments"], template)
        made.append(fields)
    return made


def _content(content: Any, template: str) -> Any:
    if content is None:
        return ""
    if isinstance(content, list) and template not in OF_PARTS:
        return "\n".join(each["text"] for each in content)
    return content


def _arguments(arguments: Any, template: str) -> Any:
    if template in OF_TEXT:
        is_text = isinstance(arguments, str)
        return arguments if is_text else json.dumps(arguments, ensure_ascii=False)
    return json.loads(arguments) if isinstance(arguments, str) else arguments
