"""Outputs of models are parsed alike, however they are cut into pieces."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dance_jax.serve.parsers.formats import AnswerFormat
from dance_jax.serve.parsers.parsed import CallDelta
from tests.serve.parsers.golden_cases import CASES, TOOLS, Answer, GoldenCase, deepseek, parsed

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
TAGGED = ("qwen_xml", "glm")
HARMONY_PROMPT = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
#: Texts of all formats, for outputs that nobody expects.
MARKERS = [
    *("<tool_call>", "</tool_call>", "<function=", "<parameter=", "</parameter>", "</function>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<think>", "</think>"),
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "```json", '{"name": "f", "arguments": ', '{"a": 1}'),
    *deepseek("<|tool▁calls▁begin|>", "<|tool▁call▁begin|>", "<|tool▁sep|>", "<|tool▁call▁end|>"),
    *("<|start|>", "assistant", "<|channel|>", "analysis", "final", "<|message|>", "<|end|>"),
    *(" to=functions.f", '"', "\\", "{", "}", "[", "]", ":", ",", "\n", " ", "f", ">", "1"),
]
FORMATS = [
    *(AnswerFormat(name, "think") for name in ("hermes", "deepseek_v3", "mistral", *TAGGED)),
    AnswerFormat("harmony", "harmony"),
]


@each_case
def test_whole_outputs(case: GoldenCase) -> None:
    assert case.parse([case.text]) == case.answer


@each_case
def test_single_characters(case: GoldenCase) -> None:
    assert case.parse(case.text) == case.answer


@given(data=st.data())
def test_any_pieces(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(CASES))
    assert case.parse(data.draw(pieces_of(case.text))) == case.answer


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("answers", FORMATS, ids=lambda answers: answers.tools)
@given(data=st.data())
def test_any_outputs(answers: AnswerFormat, required: bool, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(MARKERS), max_size=24)))

    def parse(pieces: list[str]) -> Answer:
        return parsed(answers.parser("", TOOLS, required=required), pieces)

    assert parse(data.draw(pieces_of(text))) == parse([text])


@each_case
def test_cut_off_anywhere(case: GoldenCase) -> None:
    for end in range(len(case.text)):
        answer = case.parse([case.text[:end]])
        for name, arguments in answer.calls:
            assert name
            if case.format.tools in TAGGED:
                json.loads(arguments)


@each_case
def test_nothing_given_out_is_revised(case: GoldenCase) -> None:
    """A cut only changes what was not given out yet: what the parser held back."""
    parser, given_out = case.parser(), Answer("", "", [])
    for character in case.text:
        added = parser.feed(character)
        given_out.content += added.content
        given_out.reasoning += added.reasoning
        assert case.answer.content.startswith(given_out.content)
        assert case.answer.reasoning.startswith(given_out.reasoning)


def test_text_is_held_back_only_while_it_may_be_a_marker() -> None:
    parser = AnswerFormat("hermes").parser("", TOOLS)
    given_out = [parser.feed(piece).content for piece in ("a <tool", "s> b", " <", "=", " \n", "c")]
    assert given_out == ["a", " <tools> b", "", " <=", "", " \nc"]


def test_arguments_of_json_formats_stream() -> None:
    parser = AnswerFormat("hermes").parser("", TOOLS)
    pieces = [
        '<tool_call>\n{"name": "f"',
        ', "arguments": {"a',
        '": "}',
        '"}',
        "}",
        "\n</tool_call>",
    ]
    assert [parser.feed(piece).calls for piece in pieces] == [
        [CallDelta(0, "f", "")],
        [CallDelta(0, None, '{"a')],
        [CallDelta(0, None, '": "}')],
        [CallDelta(0, None, '"}')],
        [],
        [],
    ]


def test_arguments_of_tagged_formats_come_one_by_one() -> None:
    parser = AnswerFormat("glm").parser("", TOOLS)
    calls = parser.feed(
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>1</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
    ).calls
    assert [delta.arguments for delta in calls] == ["", '{"city": "1"', ', "days": 2', "}"]


def test_without_tools_calls_are_content() -> None:
    for case in CASES:
        if case.format.is_harmony or case.required:
            continue
        answer = parsed(case.format.parser(case.prompt, None, reasoning=False), [case.text])
        assert answer == Answer(case.text, "", [])


def test_harmony_without_tools_or_reasoning_is_content() -> None:
    text = (
        "<|channel|>analysis<|message|>a<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.f<|message|>{}"
    )
    answers = AnswerFormat("harmony", "harmony")
    parser = answers.parser(HARMONY_PROMPT, None, reasoning=False)
    assert parsed(parser, text) == Answer("a\n{}", "", [])
    assert parsed(answers.parser(HARMONY_PROMPT, TOOLS), text) == Answer("", "a", [("f", "{}")])


def test_harmony_goes_on_with_the_prompt() -> None:
    prompt = f"{HARMONY_PROMPT}<|channel|>final<|message|>The answer"
    parser = AnswerFormat("harmony", "harmony").parser(prompt, TOOLS)
    assert parsed(parser, " is 4.<|return|>") == Answer(" is 4.", "", [])


def test_required_calls_stand_in_the_final_channel_of_harmony() -> None:
    text = '<|channel|>final <|constrain|>json<|message|>[{"name": "now", "arguments": {}}]'
    parser = AnswerFormat("harmony", "harmony").parser(HARMONY_PROMPT, TOOLS, required=True)
    assert parsed(parser, text) == Answer("", "", [("now", "{}")])


LONG = 100_000
#: Beginnings and ends of long texts, with the format and the number of calls.
LONG_TEXTS = {
    "content": ("hermes", "", "", 0),
    "hermes": ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "', '"}}', 1),
    "arguments first": ("hermes", '<tool_call>{"arguments": {"a": "', '"}, "name": "f"}', 1),
    "no name": ("hermes", '<tool_call>{"arguments": {"a": "', '"}}</tool_call>', 0),
    "tagged": ("glm", "<tool_call>f<arg_key>a</arg_key><arg_value>", "</arg_value></tool_call>", 1),
}


@pytest.mark.parametrize("name", LONG_TEXTS)
@pytest.mark.parametrize("filling", ["a <tool_ca\n", "<tool_call>{[ "])
def test_time_is_linear(name: str, filling: str) -> None:
    tools, begin, end, calls = LONG_TEXTS[name]
    text = begin + filling * (LONG // len(filling)) + end
    began = time.process_time()
    answers = [parsed(AnswerFormat(tools).parser("", TOOLS), pieces) for pieces in ([text], text)]
    # A quadratic parser takes minutes.
    assert time.process_time() - began < 5
    assert [len(answer.calls) for answer in answers] == [calls, calls]


@st.composite
def pieces_of(draw: st.DrawFn, text: str) -> list[str]:
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
