"""The chat template tells how a model writes its answers."""

from __future__ import annotations

import re

import pytest

from dance_jax.config import UserError
from dance_jax.serve.parsers.formats import AnswerFormat
from tests.serve.parsers.golden_cases import deepseek

QWEN = (
    "For each function call, return a json object within <tool_call></tool_call> XML tags:\\n"
    '<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n'
)
HERMES = "{{- '<tool_call>\n' }}{{- '{\"name\": <function-name>, \"arguments\": <args-dict>}' }}"
QWEN_CODER = (
    "<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>\\nvalue_1"
    "\\n</parameter>\\n</function>\\n</tool_call>"
)
GLM = (
    "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}"
    "</arg_value>\n</tool_call>{{- '/nothink' }}{{ '<think></think>' }}"
)
DEEPSEEK_V3, DEEPSEEK_R1, DEEPSEEK_V31 = deepseek(
    "{{'<|tool▁calls▁begin|><|tool▁call▁begin|>' + tool['type'] + '<|tool▁sep|>'}}",
    "{% set content = content.split('</think>')[-1] %}{{'<|tool▁call▁begin|>' + tool['type']}}",
    "{{'<|tool▁call▁begin|>'+ tool['function']['name']}}{% if not thinking %}{{'</think>'}}",
)
MISTRAL_V3 = '{{- "[TOOL_CALLS] [" }}{{- \'{"name": "\' }}{{- ", \\"arguments\\": " }}'
MISTRAL_V11 = "{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments }}"
MIXTRAL = "{{ bos_token }}{% for message in messages %}{{ '[INST] ' + message['content'] }}"
GPT_OSS = "{{- '<|start|>assistant<|channel|>commentary to=functions.' + name }}"
MINIMAX = '<minimax:tool_call>\\n<invoke name="tool">\\n<parameter name="key">'
CHATML = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        (QWEN, "hermes", None),
        (QWEN + "{{- '<think>\\n\\n</think>\\n\\n' }}", "hermes", "think"),
        (HERMES, "hermes", None),
        (QWEN_CODER, "qwen_xml", None),
        (QWEN_CODER + "<think>", "qwen_xml", "think"),
        (GLM, "glm", "think"),
        (DEEPSEEK_V3, "deepseek_v3", None),
        (DEEPSEEK_R1, "deepseek_v3", "think"),
        (DEEPSEEK_V31, "deepseek_v3", "think"),
        (MISTRAL_V3, "mistral", None),
        (MISTRAL_V11, "mistral", None),
        (MIXTRAL, None, None),
        (GPT_OSS, "harmony", "harmony"),
        (MINIMAX, None, None),
        (CHATML, None, None),
        (None, None, None),
    ],
)
def test_templates(template: str | None, tools: str | None, reasoning: str | None) -> None:
    assert AnswerFormat.detect(template) == AnswerFormat(tools, reasoning)


def test_named_formats() -> None:
    assert AnswerFormat.detect(GLM, tools="none") == AnswerFormat(None, "think")
    assert AnswerFormat.detect(GLM, reasoning="none") == AnswerFormat("glm", None)
    assert AnswerFormat.detect(None, "hermes", "think") == AnswerFormat("hermes", "think")
    with pytest.raises(UserError, match=r"tool format 'pythonic' is unknown: .* hermes, qwen_xml"):
        AnswerFormat.detect(GLM, tools="pythonic")
    with pytest.raises(UserError, match=r"reasoning format 'glm' is unknown: .* think, harmony"):
        AnswerFormat.detect(GLM, reasoning="glm")
    with pytest.raises(UserError, match="hermes and reasoning format harmony exclude each other"):
        AnswerFormat.detect(GPT_OSS, tools="hermes")


def test_special_tokens() -> None:
    special = {"mistral", "deepseek_v3", "harmony"}
    for tools in ("hermes", "qwen_xml", "glm", "deepseek_v3", "mistral", "harmony", None):
        assert AnswerFormat(tools).special_tokens == (tools in special)
    assert AnswerFormat(None, "harmony").special_tokens


def test_ids_of_calls() -> None:
    assert re.fullmatch(r"call_[0-9a-f]{24}", AnswerFormat("hermes").call_id())
    assert re.fullmatch(r"[0-9a-zA-Z]{9}", AnswerFormat("mistral").call_id())
    assert len({AnswerFormat("mistral").call_id() for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("answers", "before", "begun"),
    [
        (
            AnswerFormat("hermes", "think"),
            ["", "<think>\nHm", "<think>\nHm</think", "</think> {"],
            ["<think>\nHm</think>", "Hm\n</think>\n\n"],
        ),
        (
            AnswerFormat("harmony", "harmony"),
            [
                "<|channel|>analysis<|message|>",
                "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
                "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final",
                "<|channel|>final<|message|>{",
            ],
            [
                "<|channel|>final<|message|>",
                "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final "
                "<|constrain|>json<|message|>",
            ],
        ),
    ],
)
def test_where_the_answer_begins(
    answers: AnswerFormat, before: list[str], begun: list[str]
) -> None:
    opened = "<|start|>assistant" if answers.is_harmony else "<think>\n"
    pattern = answers.before_answer(opened)["begins_after"]
    assert not any(re.search(pattern, text) for text in before)
    assert all(re.search(pattern, text) for text in begun)


def test_which_prompts_let_the_model_reason() -> None:
    think, harmony = AnswerFormat(None, "think"), AnswerFormat("harmony", "harmony")
    assert "begins_after" in think.before_answer("<|im_start|>assistant\n<think>\n")
    maybe = {"may_begin_with": ["<think>", "</think>"]}
    assert think.before_answer("<|im_start|>assistant\n") == maybe
    assert not think.before_answer("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not AnswerFormat("hermes").before_answer("<think>")
    final = "<|start|>assistant<|channel|>final<|message|>"
    assert "begins_after" in harmony.before_answer(
        f"{final}Yes<|end|><|start|>user<|message|>No<|end|><|start|>assistant"
    )
    assert not harmony.before_answer(f"{final}Yes")
