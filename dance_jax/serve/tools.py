"""Tools: which of them a chat may call, and the structure of an answer that must call one."""

from __future__ import annotations

import json
from typing import Any

from dance_jax.serve.errors import ApiError
from dance_jax.serve.requests import ChatRequest, NamedTool

Tool = dict[str, Any]


def offered(body: ChatRequest) -> list[Tool]:
    """The tools that the model may call.

    Raises:
        ApiError: 400 if the body's fields do not fit together.
    """
    choice, tools = body.tool_choice, body.tools or []
    if choice == "none":
        return []
    if choice not in (None, "auto") and not tools:
        raise ApiError(400, "tool_choice: there are no tools", param="tool_choice")
    return tools


def forced_tools(body: ChatRequest) -> list[Tool]:
    """The tools of which the model must call at least one; none if it need not call any.

    Raises:
        ApiError: 400 if tool_choice names a tool that is not there.
    """
    tools = offered(body)
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        named = [tool for tool in tools if tool["function"]["name"] == name]
        if not named:
            raise ApiError(400, f"tool_choice: no tool is named {name!r:.80}", param="tool_choice")
        return named
    return tools if body.tool_choice == "required" else []


def calls_grammar(tools: list[Tool], parallel: bool) -> str:
    """A grammar, in llguidance's Lark, of a JSON array with calls of some tools.

    Each call is {"name": ..., "arguments": ...}.

    Args:
        tools: as in OpenAI's API.
        parallel: whether there may be several calls.
    """
    more = ' (", " call)*' if parallel else ""
    names = " | ".join(f"call_{number}" for number in range(len(tools)))
    rules = [f'start: "[" call{more} "]"', f"call: {names}"]
    for number, tool in enumerate(tools):
        function = tool["function"]
        schema = {"type": "object"} | (function.get("parameters") or {})
        # Schemas of tools have keywords that llguidance does not know.
        options = {"x-guidance": {"lenient": True, "whitespace_flexible": False}}
        head = '{"name": ' + json.dumps(function["name"]) + ', "arguments": '
        rules.append(f'call_{number}: {json.dumps(head)} args_{number} "}}"')
        rules.append(f"args_{number}: %json {json.dumps(schema | options)}")
    return "\n".join(rules)
