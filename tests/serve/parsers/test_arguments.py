"""Arguments that models write as text become JSON by the schema of the tool."""

from __future__ import annotations

import json

import pytest

from dance_jax.serve.parsers.arguments import json_argument, parameter_schemas

STRING, INTEGER = {"type": "string"}, {"type": "integer"}
BOOLEAN, OPTIONAL = {"type": "boolean"}, {"type": ["string", "null"]}
EITHER = {"anyOf": [STRING, INTEGER]}
NESTED = {"oneOf": [{"anyOf": [INTEGER, {"type": "null"}]}, BOOLEAN]}


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (STRING, "12", '"12"'),
        (STRING, ' "é"\n', '" \\"é\\"\\n"'),
        (INTEGER, " 12\n", "12"),
        (INTEGER, "twelve", '"twelve"'),
        (INTEGER, "", '""'),
        (BOOLEAN, "True", "true"),
        (BOOLEAN, "false", "false"),
        (OPTIONAL, "null", "null"),
        (OPTIONAL, "None", "null"),
        (OPTIONAL, "12", '"12"'),
        (EITHER, "12", "12"),
        (EITHER, "1.5", '"1.5"'),
        (EITHER, "true", '"true"'),
        (EITHER, '{"a": 1}', '"{\\"a\\": 1}"'),
        (NESTED, "null", "null"),
        (NESTED, "a", '"a"'),
        ({"type": ["string", "number"]}, "12", "12"),
        ({"type": "object"}, '{"a": [1, 2.50]}', '{"a": [1, 2.50]}'),
        ({"type": "number"}, "NaN", '"NaN"'),
        ({"type": "array"}, "[" * 100_000, json.dumps("[" * 100_000)),
        ({"enum": ["1", "2"]}, "1", '"1"'),
        ({"enum": ["a", 1]}, "1", "1"),
        ({}, "[1]", "[1]"),
        ({}, "two words", '"two words"'),
        (None, "12", "12"),
        (True, "12", "12"),
        ({"anyOf": 3, "type": None}, "12", "12"),
    ],
)
def test_arguments(schema: object, text: str, expected: str) -> None:
    assert json_argument(text, schema) == expected


def test_schemas_of_odd_tools() -> None:
    tools = [
        {
            "type": "function",
            "function": {"name": "a", "parameters": {"properties": {"x": STRING}}},
        },
        {"type": "function", "function": {"name": "b", "parameters": None}},
        {"type": "function", "function": {"name": "c", "parameters": {"properties": ["x"]}}},
        {"type": "function", "function": {"name": "d"}},
    ]
    assert parameter_schemas(tools) == {"a": {"x": STRING}, "b": {}, "c": {}, "d": {}}
