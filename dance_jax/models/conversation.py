"""Conversations as chat templates expect them, like transformers and vLLM hand them over."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

from dance_jax.config import UserError

Message = dict[str, Any]


def normalised(messages: Sequence[Message]) -> list[Message]:
    """Copies of messages for a template: content is text, and arguments of calls are objects.

    Args:
        messages: with the fields of OpenAI's API.

    Raises:
        UserError: content is not text, or a call's arguments are not JSON; names the message.
    """
    made = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        fields = {name: value for name, value in message.items() if name != "tool_calls" or value}
        fields["content"] = _text(message.get("content"), f"{where}.content")
        if "tool_calls" in fields:
            fields["tool_calls"] = copy.deepcopy(fields["tool_calls"])
        for call, function in _functions([fields]):
            arguments = function.get("arguments")
            function["arguments"] = _parsed(
                arguments, f"{where}.tool_calls[{call}].function.arguments"
            )
        made.append(fields)
    return made


def with_arguments_as_text(messages: Sequence[Message]) -> list[Message]:
    """Normalised messages for templates that want the arguments of calls as text."""
    made = [*copy.deepcopy(messages)]
    for _, function in _functions(made):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return made


def has_calls(messages: Sequence[Message]) -> bool:
    """Whether any message calls a function."""
    return any(True for _ in _functions(messages))


def marked(messages: Sequence[Message]) -> tuple[list[Message], dict[int, str]]:
    """Messages that a template might drop, with marks as their contents.

    Templates know users and assistants. Messages of other roles may vanish in silence.

    Returns:
        All messages; and the marks, by number of the message.
    """
    marks = {
        number: f"mark{number}mark"
        for number, message in enumerate(messages)
        if message["role"] not in ("user", "assistant") and message["content"]
    }
    made = [
        message | ({"content": marks[number]} if number in marks else {})
        for number, message in enumerate(messages)
    ]
    return made, marks


def up_to_the_end_of(content: str, text: str) -> str | None:
    """A rendered text up to the end of its last message, as transformers cuts it.

    Args:
        content: of the last message.
        text: rendered, without the beginning of an answer.

    Returns:
        None if the template does not show the content.
    """
    bare = content.strip()
    if not bare or bare not in text:
        return None
    begin = text.rindex(bare)
    whole = content.lstrip()
    kept = whole if text[begin : begin + len(whole)] == whole else bare
    return text[: begin + len(kept)]


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "\n".join(texts)
    raise UserError(f"{where}: must be text")


def _functions(messages: Sequence[Message]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The functions that messages call, each with the call's number in its message."""
    for message in messages:
        calls = message.get("tool_calls")
        for number, call in enumerate(calls if isinstance(calls, list) else ()):
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict):
                yield number, function


def _parsed(arguments: Any, where: str) -> Any:
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON: {error}") from error
