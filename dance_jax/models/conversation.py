"""Conversations as chat templates expect them, like transformers and vLLM hand them over."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pydantic_core

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


def with_content_as_parts(messages: Sequence[Message]) -> list[Message]:
    """Normalised messages for templates that want content as a list of parts."""
    return [
        each | {"content": [{"type": "text", "text": each["content"]}]}
        if isinstance(each["content"], str)
        else each
        for each in messages
    ]


def with_change(messages: Sequence[Message], number: int, before: str, after: str) -> list[Message]:
    """Normalised messages, one of them with other text before and after its content."""
    content = messages[number]["content"]
    text = content if isinstance(content, str) else content[0]["text"]
    changed = f"{before}{text}{after}"
    new = changed if isinstance(content, str) else [{"type": "text", "text": changed}]
    return [*messages[:number], messages[number] | {"content": new}, *messages[number + 1 :]]


def text_of(message: Message) -> str:
    """The text of a normalised message's content, in either form."""
    content = message["content"]
    return content if isinstance(content, str) else content[0]["text"]


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


def _parsed(arguments: Any, where: str) -> dict[str, Any]:
    """Arguments as an object; they come from models, so they may be anything."""
    if isinstance(arguments, str):
        try:
            # Strict JSON, of bounded depth and in valid Unicode.
            arguments = pydantic_core.from_json(arguments.strip() or "{}", allow_inf_nan=False)
        except ValueError as error:
            raise UserError(f"{where}: is not JSON: {error}") from error
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: must be a JSON object")
    return arguments
