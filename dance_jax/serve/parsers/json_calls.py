"""Tool calls whose arguments are JSON texts: Hermes, DeepSeek, Mistral, and plain arrays."""

from __future__ import annotations

import json

from dance_jax.serve.parsers.calls import CallParser
from dance_jax.serve.parsers.source import Markers, Reading, Sink, Unread

_ARGUMENTS = ("arguments", "parameters")


class ObjectCallParser(CallParser):
    """Base of formats with calls like `{"name": ..., "arguments": {...}}`."""

    def read_object(self) -> Reading[None]:
        """Read a call, whose keys may stand in any order."""
        named = given = False
        early: list[str] = []
        yield from self.source.expect("{")
        while True:
            key = yield from self._key()
            if key == "name" and not named:
                self.begin((yield from self._string()))
                named = True
                if given:
                    self.add_arguments("".join(early))
            elif key in _ARGUMENTS and not given:
                yield from self._arguments(self.add_arguments if named else early.append)
                given = True
            else:
                yield from self.source.value(lambda _: None)
            yield from self.source.space()
            if (yield from self.source.expect(",", "}")) == "}":
                break
        if not named:
            raise Unread
        if not given:
            self.add_arguments("{}")

    def read_array(self) -> Reading[None]:
        """Read calls in an array, after its bracket."""
        yield from self.source.space()
        if (yield from self.source.literal("]")):
            return
        while True:
            yield from self.source.space()
            yield from self.read_object()
            yield from self.source.space()
            if (yield from self.source.expect(",", "]")) == "]":
                return
            self.open()

    def _key(self) -> Reading[str]:
        yield from self.source.space()
        key = yield from self._string()
        yield from self.source.space()
        yield from self.source.expect(":")
        yield from self.source.space()
        return key

    def _arguments(self, sink: Sink) -> Reading[None]:
        """Pass on the arguments. Some models write them as a string that holds the JSON text."""
        if (yield from self.source.peek()) == '"':
            sink((yield from self._string()) or "{}")
        else:
            yield from self.source.value(sink)

    def _string(self) -> Reading[str]:
        pieces: list[str] = []
        yield from self.source.value(pieces.append)
        try:
            text = json.loads("".join(pieces), strict=False)
        except (ValueError, RecursionError):
            raise Unread from None
        if not isinstance(text, str):
            raise Unread
        return text


class JsonCalls(ObjectCallParser):
    """An answer that is a JSON array of calls, without any marker.

    It is the answer of every model that is made to call a tool, because the sampler then allows
    nothing else.
    """

    def steps(self) -> Reading[None]:
        yield from self.attempt("")
        yield from self.source.rest(self._content.add)

    def call(self, opening: str) -> Reading[None]:
        yield from self.source.space()
        yield from self.source.expect("[")
        yield from self.read_array()


class HermesParser(ObjectCallParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Qwen2.5, Qwen3 and others."""

    openings = Markers("<tool_call>")

    def call(self, opening: str) -> Reading[None]:
        yield from self.source.space()
        yield from self.read_object()
        yield from self.source.space()
        yield from self.source.literal("</tool_call>")


class MistralParser(ObjectCallParser):
    """Mistral's formats: an array of calls after `[TOOL_CALLS]`, or one call after each.

    The newer one is `[TOOL_CALLS]NAME[ARGS]{...}`. `[CALL_ID]` and an id may follow the name, and
    `[ARGS]` may be missing.
    """

    openings = Markers("[TOOL_CALLS]")

    def call(self, opening: str) -> Reading[None]:
        yield from self.source.space()
        if (yield from self.source.literal("[")):
            yield from self.read_array()
        else:
            yield from self._named_call()

    def _named_call(self) -> Reading[None]:
        name = yield from self.source.word()
        yield from self.source.space()
        if (yield from self.source.literal("[CALL_ID]")):
            yield from self.source.space()
            yield from self.source.word()
            yield from self.source.space()
        yield from self.source.literal("[ARGS]")
        yield from self.source.space()
        if (yield from self.source.peek()) != "{":
            raise Unread
        self.begin(name)
        yield from self.source.value(self.add_arguments)


def _deepseek(name: str) -> str:
    """A special token of DeepSeek's, which has fullwidth bars."""
    return f"<\uff5c{name}\uff5c>"


_CALLS, _END_OF_CALLS = _deepseek("tool▁calls▁begin"), _deepseek("tool▁calls▁end")
_CALL, _END_OF_CALL = _deepseek("tool▁call▁begin"), _deepseek("tool▁call▁end")
_SEPARATOR = _deepseek("tool▁sep")


class DeepSeekParser(CallParser):
    """DeepSeek's formats, whose calls are enclosed in special tokens.

    V3 and R1 write the type `function`, the name, and the arguments as a block of Markdown. V3.1
    writes the name and the arguments.
    """

    #: The text with which all calls begin.
    begin_of_calls = _CALLS
    openings = Markers(_CALLS, _CALL)

    def call(self, opening: str) -> Reading[None]:
        if opening == _CALLS:
            yield from self.source.space()
            yield from self.source.expect(_CALL)
        name, fenced = yield from self._head()
        self.begin(name)
        yield from self.source.value(self.add_arguments)
        yield from self.source.space()
        if fenced:
            yield from self.source.literal("```")
            yield from self.source.space()
        yield from self.source.literal(_END_OF_CALL)
        yield from self.source.space()
        yield from self.source.literal(_END_OF_CALLS)

    def _head(self) -> Reading[tuple[str, bool]]:
        """Read up to the arguments. Returns the name, and whether the arguments are a block."""
        yield from self.source.space()
        name = yield from self.source.word()
        yield from self.source.space()
        yield from self.source.expect(_SEPARATOR)
        yield from self.source.space()
        if (yield from self.source.peek()) == "{":
            return name, False
        name = yield from self.source.word()
        yield from self.source.space()
        fence = yield from self.source.literal("```")
        if fence:
            yield from self.source.literal("json")
            yield from self.source.space()
        if (yield from self.source.peek()) != "{":
            raise Unread
        return name, bool(fence)
