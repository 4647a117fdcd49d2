"""Arguments that a model writes as plain text, converted by the schema of the tool."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

#: How JSON Schema names the types of JSON values. Whole numbers are numbers as well.
_TYPES = {
    type(None): {"null"},
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    str: {"string"},
    list: {"array"},
    dict: {"object"},
}
#: Chat templates show models Python's spelling of these.
_PYTHON = {"True": "true", "False": "false", "None": "null"}


def parameter_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Schemas of parameters, by the names of the function and the parameter."""
    functions = [_mapping(tool.get("function")) for tool in tools]
    return {
        str(function.get("name")): _mapping(_mapping(function.get("parameters")).get("properties"))
        for function in functions
    }


def json_argument(text: str, schema: object) -> str:
    """The JSON text of an argument.

    A text is taken as it is where the schema allows strings, unless it is a value of another type
    that the schema allows. Otherwise it is taken as JSON if it is any, and else as a string.

    Args:
        text: what the model wrote.
        schema: the parameter's schema; anything else than a dict allows everything.
    """
    allowed = _allowed_types(schema)
    if allowed == {"string"}:
        return _quoted(text)
    candidate = text.strip()
    if allowed & {"boolean", "null"}:
        candidate = _PYTHON.get(candidate, candidate)
    try:
        value = json.loads(candidate, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _quoted(text)
    if "string" in allowed and not _TYPES[type(value)] & (allowed - {"string"}):
        return _quoted(text)
    return candidate


def _allowed_types(schema: object) -> set[str]:
    """Types of the values that a schema allows. Empty if it does not say."""
    if not isinstance(schema, dict):
        return set()
    types = schema.get("type")
    if isinstance(types, str):
        return {types}
    if isinstance(types, list):
        return {each for each in types if isinstance(each, str)}
    if isinstance(schema.get("enum"), list):
        return set().union(*(_TYPES.get(type(value), set()) for value in schema["enum"]))
    choices = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    return set().union(*map(_allowed_types, choices)) if isinstance(choices, list) else set()


def _mapping(value: object) -> dict[str, Any]:
    """`value`, or an empty dict for anything else: nothing has checked the schemas."""
    return value if isinstance(value, dict) else {}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> float:
    """NaN and infinities are no JSON, although Python reads them."""
    raise ValueError(constant)
