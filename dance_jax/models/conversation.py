"""Conversations as texts: messages in the form that a chat template expects, and none dropped.

Messages are handed over as transformers and vLLM do. Templates differ in what they want, so what a
template makes of each form of a conversation is looked at (`forms`).
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

#: Names under which clients send what an assistant thought; templates read the first or the second.
_THOUGHT = ("reasoning_content", "thinking", "reasoning")
#: A key of every part of content. A text with it shows the list itself instead of its texts. It is
#: random, so that no message has it.
_MARK = f"part-{secrets.token_hex(8)}"


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
        text, form = self._best(messages, names)
        return self._cut(text, form, names) if continue_final_message else text

    def _best(
        self, messages: Sequence[Message], names: dict[str, Any]
    ) -> tuple[str, list[Message]]:
        """The text of the first form that is shown whole, and that form."""
        failure, without_calls = None, None
        for form in forms(messages, self._template.mentions("developer")):
            try:
                text = self._render(form, names)
                self._check_whole(text, form, messages, names)
            except TemplateRefusal as refusal:
                # Of parts, a template that wants text may tell only that their type is wrong.
                failure = failure or (None if has_parts(form) else refusal)
                continue
            if shows_calls(text, form):
                return text, form
            without_calls = without_calls or (text, form)
        if without_calls is None:
            assert failure is not None
            raise failure
        return without_calls

    def _render(self, messages: Sequence[Message], names: dict[str, Any]) -> str:
        return self._template.render(names | {"messages": [*messages]})

    def _refusal(self, reason: str) -> TemplateRefusal:
        return TemplateRefusal(self._template.where, reason)

    def _check_whole(
        self,
        text: str,
        form: Sequence[Message],
        messages: Sequence[Message],
        names: dict[str, Any],
    ) -> None:
        """Check that a text shows all messages."""
        if _MARK in text:
            raise self._refusal("it takes content as text only")
        for number in range(len(form)):
            if self._is_dropped(text, form, number, names):
                role = messages[number]["role"]
                raise self._refusal(f"it drops messages[{number}], whose role is {role!r}")

    def _is_dropped(
        self, text: str, form: Sequence[Message], number: int, names: dict[str, Any]
    ) -> bool:
        """Whether the content of a message has no effect on the text.

        Text of assistants is not looked at: templates may leave out what they thought.
        """
        message, content = form[number], text_of(form[number])
        if message["role"] == "assistant" and not has_parts([message]):
            return False
        if not content.strip() or content in text or self._has_effect(text, form, number, names):
            return False
        # Mistral's templates show the system's message only if a user's message comes last.
        question = up_to_user(form)
        if not number < len(question) < len(form):
            return True
        with contextlib.suppress(TemplateRefusal):
            return not self._has_effect(self._render(question, names), question, number, names)
        return True

    def _has_effect(
        self, text: str, form: Sequence[Message], number: int, names: dict[str, Any]
    ) -> bool:
        """Whether other content of a message makes another text."""
        try:
            return self._render(with_change(form, number, "x", "x"), names) != text
        except TemplateRefusal:
            return True  # The template looks at the content if it refuses another one.

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


def forms(messages: Sequence[Message], has_developer: bool) -> Iterator[list[Message]]:
    """The forms of messages that templates want, the usual one first.

    Args:
        messages: with the fields of OpenAI's API.
        has_developer: the template knows developers, OpenAI's newer name of the system.

    Raises:
        UserError: a message is wrong.
    """
    given = normalised(messages)
    if not has_developer:
        roles = {"developer": "system"}
        given = [each | {"role": roles.get(each["role"], each["role"])} for each in given]
    yield from _forms_of(given, messages)
    if (shorter := without_thoughts_beside_text(given)) != given:
        yield from _forms_of(shorter, messages)


def _forms_of(given: list[Message], messages: Sequence[Message]) -> Iterator[list[Message]]:
    texts = with_content_as_text(given)
    for contents in [given] * has_parts(given) + [texts, with_content_as_parts(texts)]:
        yield contents
        if not has_calls(given):
            continue
        yield with_arguments_as_text(contents, messages)
        nulls = with_null_content(contents)
        yield nulls
        yield with_arguments_as_text(nulls, messages)


def normalised(messages: Sequence[Message]) -> list[Message]:
    """Copies of messages for a template.

    Content is text or a list of parts, arguments of calls are objects, fields that are null are
    left out, and what an assistant thought has the names that templates read.

    Args:
        messages: with the fields of OpenAI's API.

    Raises:
        UserError: content is not text, or a call's arguments are not JSON; names the message.
    """
    made = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        fields = {name: value for name, value in message.items() if value is not None}
        fields["content"] = _content(message.get("content"), f"{where}.content")
        if not fields.get("tool_calls"):
            fields.pop("tool_calls", None)
        fields = _with_thought(copy.deepcopy(fields))
        for call, function in _functions([fields]):
            arguments = function.get("arguments")
            function["arguments"] = _parsed(
                arguments, f"{where}.tool_calls[{call}].function.arguments"
            )
        made.append(fields)
    return made


def with_arguments_as_text(messages: Sequence[Message], given: Sequence[Message]) -> list[Message]:
    """Normalised messages for templates that want the arguments of calls as text.

    Args:
        messages: normalised.
        given: the same messages with the fields of OpenAI's API.
    """
    made = [*copy.deepcopy(messages)]
    for (_, function), (_, original) in zip(_functions(made), _functions(given), strict=True):
        text = original.get("arguments")
        is_object = isinstance(text, str) and text.strip().startswith("{")
        function["arguments"] = (
            text if is_object else json.dumps(function["arguments"], ensure_ascii=False)
        )
    return made


def has_calls(messages: Sequence[Message]) -> bool:
    """Whether any message calls a function."""
    return any(True for _ in _functions(messages))


def has_parts(messages: Sequence[Message]) -> bool:
    """Whether the content of any normalised message is a list of parts."""
    return any(isinstance(each["content"], list) for each in messages)


def shows_calls(text: str, messages: Sequence[Message]) -> bool:
    """Whether the names of all functions that messages call are in a text."""
    names = (function.get("name") for _, function in _functions(messages))
    return all(name in text for name in names if isinstance(name, str))


def with_null_content(messages: Sequence[Message]) -> list[Message]:
    """Normalised messages for templates that show calls only if the content is null."""
    return [
        each | {"content": None} if has_calls([each]) and not each["content"] else each
        for each in messages
    ]


def without_thoughts_beside_text(messages: list[Message]) -> list[Message]:
    """Normalised messages for templates that take calls with thoughts or with text, not with both.

    gpt-oss writes both, and its template refuses them.
    """
    return [
        {name: value for name, value in each.items() if name not in _THOUGHT}
        if has_calls([each]) and text_of(each)
        else each
        for each in messages
    ]


def with_content_as_text(messages: Sequence[Message]) -> list[Message]:
    """Normalised messages for templates that want content as text."""
    return [each | {"content": text_of(each)} for each in messages]


def with_content_as_parts(messages: Sequence[Message]) -> list[Message]:
    """Normalised messages for templates that want content as a list of parts."""
    return [each | {"content": [_part(text_of(each))]} for each in messages]


def with_change(messages: Sequence[Message], number: int, before: str, after: str) -> list[Message]:
    """Normalised messages, one of them with other text before and after its content."""
    content = messages[number]["content"] or ""
    if isinstance(content, str):
        new: Any = f"{before}{content}{after}"
    else:
        first, *rest = [part["text"] for part in content]
        *rest, last = before + first, *rest
        new = [_part(text) for text in (*rest, last + after)]
    return [*messages[:number], messages[number] | {"content": new}, *messages[number + 1 :]]


def up_to_user(messages: Sequence[Message]) -> Sequence[Message]:
    """Messages up to the last one of a user; all if there is none."""
    users = [number for number, each in enumerate(messages) if each["role"] == "user"]
    return messages[: users[-1] + 1] if users else messages


def text_of(message: Message) -> str:
    """The text of a normalised message's content, in any form."""
    content = message["content"] or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text, _MARK: ""}


def _content(content: Any, where: str) -> str | list[dict[str, str]]:
    if content is None or content == []:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return [_part(text) for text in texts]
    raise UserError(f"{where}: must be text")


def _with_thought(message: Message) -> Message:
    """A message with what the assistant thought under the names that templates read."""
    thought = next((message[name] for name in _THOUGHT if name in message), None)
    if thought is None:
        return message
    return {"thinking": thought, **message, "reasoning_content": thought}


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
