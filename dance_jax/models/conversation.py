"""Conversations as texts: messages in the form that a chat template expects, and none dropped.

Messages are handed over as transformers and vLLM do. Templates differ in what they want, so what a
template makes of a conversation is looked at.
"""

from __future__ import annotations

import contextlib
import copy
import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import pydantic_core

from dance_jax.config import UserError
from dance_jax.models.chat_template import ChatTemplate, TemplateRefusal

Message = dict[str, Any]


class Conversation:
    """Renders conversations with a model's chat template.

    Args:
        template: of the model.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def text(
        self, messages: Sequence[Message], names: dict[str, Any], continue_final_message: bool
    ) -> str:
        """Render a conversation.

        Args:
            messages: with the fields of OpenAI's API.
            names: the template's other variables.
            continue_final_message: end where the content of the last message ends.

        Raises:
            UserError: a message is wrong.
            TemplateFailure: the template gives no text for the messages, or drops one of them.
        """
        given = normalised(messages)
        if not self._template.mentions("developer"):
            # OpenAI's newer name of the role that templates know as system.
            roles = {"developer": "system"}
            given = [each | {"role": roles.get(each["role"], each["role"])} for each in given]
        text, given = self._rendered(given, names)
        dropped = self._dropped(text, given, names)
        if dropped is not None:
            # Some templates show content only if it is a list of parts.
            with contextlib.suppress(TemplateRefusal):
                parts = with_content_as_parts(given)
                of_parts = self._render(parts, names)
                if self._dropped(of_parts, parts, names) is None:
                    text, given, dropped = of_parts, parts, None
        if dropped is not None:
            role = messages[dropped]["role"]
            raise self._refusal(f"it drops messages[{dropped}], whose role is {role!r}")
        return self._cut(text, given, names) if continue_final_message else text

    def _render(self, messages: Sequence[Message], names: dict[str, Any]) -> str:
        return self._template.render(names | {"messages": [*messages]})

    def _refusal(self, reason: str) -> TemplateRefusal:
        return TemplateRefusal(self._template.where, reason)

    def _rendered(
        self, messages: list[Message], names: dict[str, Any]
    ) -> tuple[str, list[Message]]:
        """The text, and the messages in the form that the template can handle."""
        try:
            return self._render(messages, names), messages
        except TemplateRefusal as refusal:
            if not has_calls(messages):
                raise
            as_text = with_arguments_as_text(messages)
            try:
                return self._render(as_text, names), as_text
            except TemplateRefusal:
                raise refusal from None

    def _dropped(self, text: str, messages: Sequence[Message], names: dict[str, Any]) -> int | None:
        """Number of a message whose content has no effect on the text; None if all have.

        Assistants' are not looked at: templates may leave out what they thought.
        """
        for number, message in enumerate(messages):
            content = text_of(message)
            if message["role"] == "assistant" or not content.strip() or content in text:
                continue
            # It looks at the content if it refuses another one.
            with contextlib.suppress(TemplateRefusal):
                if self._render(with_change(messages, number, "x", "x"), names) == text:
                    return number
        return None

    def _cut(self, text: str, messages: Sequence[Message], names: dict[str, Any]) -> str:
        """A rendered text up to the end of its last message's content."""
        mark = f"<{secrets.token_hex(8)}>"
        shown = self._render(with_change(messages, len(messages) - 1, "", mark), names)
        before, found, _ = shown.rpartition(mark)
        if text_of(messages[-1]).strip() and found:
            # A template that strips contents has not stripped what now precedes the mark.
            for cut in (before, before.rstrip()):
                if text.startswith(cut):
                    return cut
        raise self._refusal("it does not show the end of the last message")


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
