"""Tool calls whose arguments are tagged texts: Qwen3-Coder and GLM."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from dance_jax.serve.parsers.arguments import json_argument, parameter_schemas
from dance_jax.serve.parsers.calls import CallParser
from dance_jax.serve.parsers.source import Markers, Reading

_END_OF_CALL = "</tool_call>"
#: The name of a parameter in Qwen's tag.
_TAG_NAME = re.compile(r"[^<>\n]*")


class TaggedCallParser(CallParser):
    """Base of formats whose arguments are converted to JSON, one delta for each.

    The arguments of a call that is cut off are closed after the last complete one.

    Args:
        tools: the tools in OpenAI's form, whose schemas say which arguments are strings.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self._schemas = parameter_schemas(tools)

    @abstractmethod
    def read_name(self, opening: str) -> Reading[str]:
        """Read the name of the function."""

    @abstractmethod
    def read_argument(self) -> Reading[tuple[str, str] | None]:
        """Read an argument: its name and text. None at the end of the call, which is read."""

    def call(self, opening: str) -> Reading[None]:
        yield from self.source.space()
        name = yield from self.read_name(opening)
        self.begin(name)
        schemas = self._schemas.get(name, {})
        separator = "{"
        try:
            while (argument := (yield from self.read_argument())) is not None:
                key, text = argument
                value = json_argument(text, schemas.get(key))
                self.add_arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: {value}")
                separator = ", "
        finally:
            self.add_arguments("{}" if separator == "{" else "}")

    def read_text(self, end: Markers) -> Reading[str]:
        """Read the text up to `end`."""
        pieces: list[str] = []
        yield from self.source.until(end, pieces.append)
        return "".join(pieces)


class QwenXmlParser(TaggedCallParser):
    """`<tool_call><function=NAME><parameter=KEY>TEXT</parameter></function></tool_call>`.

    Qwen3-Coder and Qwen3.5 write this, with a line break around each text. Qwen3-Coder sometimes
    leaves out `<tool_call>`.
    """

    _FUNCTION, _END_OF_FUNCTION, _PARAMETER = "<function=", "</function>", "<parameter="
    _END_OF_TEXT = Markers("</parameter>")
    openings = Markers("<tool_call>", _FUNCTION)

    def read_name(self, opening: str) -> Reading[str]:
        if opening != self._FUNCTION:
            yield from self.source.expect(self._FUNCTION)
        name = yield from self.source.word()
        yield from self.source.expect(">")
        return name

    def read_argument(self) -> Reading[tuple[str, str] | None]:
        yield from self.source.space()
        tag = yield from self.source.expect(self._PARAMETER, self._END_OF_FUNCTION)
        if tag == self._END_OF_FUNCTION:
            yield from self.source.space()
            yield from self.source.literal(_END_OF_CALL)
            return None
        key = yield from self.source.run(_TAG_NAME)
        yield from self.source.expect(">")
        text = yield from self.read_text(self._END_OF_TEXT)
        return key, text.removeprefix("\n").removesuffix("\n")


class GlmParser(TaggedCallParser):
    """`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>TEXT</arg_value></tool_call>`: GLM-4.5."""

    _KEY = "<arg_key>"
    _END_OF_KEY, _END_OF_VALUE = Markers("</arg_key>"), Markers("</arg_value>")
    openings = Markers("<tool_call>")

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(tools)
        #: The tag that was read after the name.
        self._tag: str | None = None

    def read_name(self, opening: str) -> Reading[str]:
        name = yield from self.source.word()
        self._tag = yield from self._next_tag()
        return name

    def read_argument(self) -> Reading[tuple[str, str] | None]:
        tag = self._tag or (yield from self._next_tag())
        self._tag = None
        if tag == _END_OF_CALL:
            return None
        key = yield from self.read_text(self._END_OF_KEY)
        yield from self.source.space()
        yield from self.source.expect("<arg_value>")
        text = yield from self.read_text(self._END_OF_VALUE)
        return key.strip(), text

    def _next_tag(self) -> Reading[str]:
        yield from self.source.space()
        return (yield from self.source.expect(self._KEY, _END_OF_CALL))
