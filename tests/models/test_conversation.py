"""Conversations as they reach chat templates."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from dance_jax.config import UserError
from dance_jax.models import model_config
from dance_jax.models.random_weights import write_byte_tokenizer
from dance_jax.models.tokenizer import Tokenizer
from tests.tiny_models import SERVED

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Öst"}'}}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "w?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "5"},
]
#: Shows all messages; CALLS stands for what it makes of the arguments.
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} CALLS{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "config.json").write_text(json.dumps(SERVED))
    write_byte_tokenizer(tmp_path, model_config(SERVED))
    return tmp_path


def with_template(directory: pathlib.Path, template: str) -> Tokenizer:
    return Tokenizer.load(directory, chat_template=(template, "a file"))


@pytest.mark.parametrize(
    "calls",
    [
        "{{ c.function.arguments | tojson }}",
        "{{ c.function.arguments }}",
        "{{ '' + c.function.arguments }}",
        "{% if c.function.arguments is string %}no{% else %}{{ c.function.arguments | tojson }}"
        "{% endif %}",
    ],
    ids=["as objects", "printed", "as text", "either"],
)
def test_arguments_of_calls(directory: pathlib.Path, calls: str) -> None:
    """Whatever form a template wants them in, they are in the text once, as JSON."""
    tokenizer = with_template(directory, TEMPLATE.replace("CALLS", calls))
    expected = '[user]w?[assistant]f {"city": "Öst"}[tool]5[assistant]'
    assert tokenizer.chat_text(HISTORY) == expected
    assert isinstance(HISTORY[1]["tool_calls"][0]["function"]["arguments"], str)


def test_text_of_arguments_stays_as_it_is(directory: pathlib.Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a":1.0,"b":"\\u00e9"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    template = TEMPLATE.replace("CALLS", "{{ '' + c.function.arguments }}")
    text = with_template(directory, template).chat_text([message])
    assert text == '[assistant]f {"a":1.0,"b":"\\u00e9"}[assistant]'


@pytest.mark.parametrize("content", [None, ""])
def test_calls_that_are_shown_beside_null_content_alone(
    directory: pathlib.Path, content: str | None
) -> None:
    template = TEMPLATE.replace("m.tool_calls or []", "(m.tool_calls if m.content is none) or []")
    template = template.replace("{{ m.content }}", "{{ m.content or '' }}")
    template = template.replace("CALLS", "{{ c.function.arguments | tojson }}")
    text = with_template(directory, template).chat_text([HISTORY[1] | {"content": content}])
    assert text == '[assistant]f {"city": "Öst"}[assistant]'


def test_calls_that_a_template_does_not_show(directory: pathlib.Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert with_template(directory, template).chat_text(HISTORY) == "[user]w?[assistant][tool]5"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_names_of_what_was_thought(directory: pathlib.Path, name: str) -> None:
    message = {"role": "assistant", "content": "", "reasoning_content": None, name: "hm"}
    template = "{{ messages[0].reasoning_content }} {{ messages[0].thinking }}"
    assert with_template(directory, template).chat_text([message]) == "hm hm"


def test_null_fields_are_left_out(directory: pathlib.Path) -> None:
    message = {"role": "user", "content": None, "name": None, "tool_calls": None}
    template = "{% for name in messages[0] %}{{ name }} {% endfor %}"
    assert with_template(directory, template).chat_text([message]) == "role content "


def test_what_is_not_json_is_named(directory: pathlib.Path) -> None:
    wrong = ("{city", "[" * 5000 + "]" * 5000, '{"a": NaN}', '{"a": "\\ud800"}', "[1]", "5", 5)
    for arguments in wrong:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        message = {"role": "assistant", "content": "", "tool_calls": [CALL, call]}
        where = r"messages\[0\]\.tool_calls\[1\]\.function\.arguments: "
        with pytest.raises(UserError, match=where):
            with_template(directory, TEMPLATE).chat_text([message])
    with pytest.raises(UserError, match=r"messages\[0\]\.content: must be text"):
        with_template(directory, TEMPLATE).chat_text([{"role": "user", "content": [{"a": 1}]}])


def test_no_message_vanishes(directory: pathlib.Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    tokenizer = with_template(directory, template)
    assert tokenizer.chat_text([{"role": "system", "content": ""}, *HISTORY[:1]]) == "w?"
    with pytest.raises(UserError, match=r"drops messages\[2\], whose role is 'tool'"):
        tokenizer.chat_text(HISTORY)
    with pytest.raises(UserError, match=r"drops messages\[0\], whose role is 'developer'"):
        tokenizer.chat_text([{"role": "developer", "content": "be kind"}, *HISTORY[:1]])


def test_a_system_may_be_shown_to_users_alone(directory: pathlib.Path) -> None:
    """Mistral's templates leave it out where a result of a tool comes last."""
    template = (
        "{% for m in messages if m.role != 'system' %}"
        "{% if loop.last and m.role == 'user' %}{{ messages[0].content }} {% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    tokenizer = with_template(directory, template)
    system = {"role": "system", "content": "be kind"}
    assert tokenizer.chat_text([system, *HISTORY[:1]]) == "be kind w?"
    assert tokenizer.chat_text([system, *HISTORY]) == "w?5"
    with pytest.raises(UserError, match=r"drops messages\[2\], whose role is 'system'"):
        tokenizer.chat_text([system, *HISTORY[:1], system | {"content": "be brief"}])


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("{{ m.content }}", "a\nb"),
        ("{{ m.content | tojson }}", '"a\\nb"'),
        ("{{ m.content + '!' }}", "a\nb!"),
        ("{% if m.content is string %}{{ m.content }}{% endif %}", "a\nb"),
        ("{% for p in m.content %}{{ p.text }}-{% endfor %}", "a-b-"),
        ("{% for p in m.content %}{{ p['text'] | trim + ' ' }}{% endfor %}", "a b "),
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_parts_of_content(directory: pathlib.Path, role: str, shown: str, expected: str) -> None:
    """A template that takes parts gets them as they came; others get their texts in lines."""
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    tokenizer = with_template(directory, "{% for m in messages %}" + shown + "{% endfor %}")
    assert tokenizer.chat_text([{"role": role, "content": content}]) == expected


def test_the_reason_is_that_of_text(directory: pathlib.Path) -> None:
    template = "{{ messages[0].content + '' }}{{ raise_exception('too kind') }}"
    message = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    with pytest.raises(UserError, match="too kind"):
        with_template(directory, template).chat_text([message])


@pytest.mark.parametrize(
    "shown",
    [
        "{{ m.content | upper }}",
        "{{ m.content[:3] }}",
        "{% for p in m.content %}{{ p.text }}{% endfor %}",
    ],
    ids=["changed", "cut", "of parts alone"],
)
def test_what_is_shown_in_another_form_is_not_dropped(directory: pathlib.Path, shown: str) -> None:
    template = "{% for m in messages %}" + shown + "{% endfor %}"
    messages = [{"role": "tool", "content": "five"}, {"role": "user", "content": "why?"}]
    text = with_template(directory, template).chat_text(messages)
    assert text.lower() in ("fivewhy?", "fivwhy")


@pytest.mark.parametrize("arguments", ["", " ", "null", None, "{}"])
def test_no_arguments(directory: pathlib.Path, arguments: str | None) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    template = TEMPLATE.replace("CALLS", "{{ c.function.arguments }}")
    assert with_template(directory, template).chat_text(messages) == "[assistant]f {}[assistant]"


@pytest.mark.parametrize("name", ["self", "messages", "args"])
def test_variables_may_have_any_name(directory: pathlib.Path, name: str) -> None:
    text = with_template(directory, TEMPLATE).chat_text(HISTORY[:1], **{name: 5})
    assert text == "[user]w?[assistant]"


def test_developers_are_the_system_of_older_templates(directory: pathlib.Path) -> None:
    messages = [{"role": "developer", "content": "be kind"}]
    assert with_template(directory, TEMPLATE).chat_text(messages) == "[system]be kind[assistant]"
    assert with_template(directory, TEMPLATE + "{# for developers #}").chat_text(messages)
    newer = TEMPLATE + "{% if messages[0].role == 'developer' %}{% endif %}"
    assert with_template(directory, newer).chat_text(messages) == "[developer]be kind[assistant]"


@pytest.mark.parametrize(
    ("shown", "content", "expected"),
    [
        ("{{ m.content }}", "Once upon ", "[user]w?[assistant]Once upon "),
        ("{{ m.content | trim }}", "Once upon ", "[user]w?[assistant]Once upon"),
        ("{{ m.content }}</s>", "w?", "[user]w?</s>[assistant]w?"),
        ("{{ m.content }}<|im_end|>", "end", "[user]w?<|im_end|>[assistant]end"),
        ("{{ m.content }}</s>", [{"type": "text", "text": "a "}], "[user]w?</s>[assistant]a "),
    ],
)
def test_an_answer_goes_on(
    directory: pathlib.Path, shown: str, content: Any, expected: str
) -> None:
    template = "{% for m in messages %}[{{ m.role }}]" + shown + "{% endfor %}"
    messages = [*HISTORY[:1], {"role": "assistant", "content": content}]
    tokenizer = with_template(directory, template)
    assert tokenizer.chat_text(messages, continue_final_message=True) == expected
    with pytest.raises(UserError, match="does not show the end of the last message"):
        hidden = with_template(directory, "{{ messages[0].content }}")
        hidden.chat_text([messages[0], messages[1] | {"content": "x"}], continue_final_message=True)


FOUND = "found {{ messages[0].content }}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", FOUND),
        ("additional_chat_templates/default.jinja", FOUND),
        ("chat_template.json", json.dumps({"chat_template": FOUND})),
        ("tokenizer_config.json", json.dumps({"chat_template": {"default": FOUND}})),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": "default", "template": FOUND}]}),
        ),
    ],
)
def test_files_of_templates(directory: pathlib.Path, name: str, content: str) -> None:
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text(content)
    assert Tokenizer.load(directory).chat_text(HISTORY[:1]) == "found w?"
    (directory / "tokenizer_config.json").write_text('{"chat_template": ["a", "b"]}')
    if name in ("tokenizer_config.json", "chat_template.json"):
        with pytest.raises(UserError, match="neither a string nor a list with a template named"):
            Tokenizer.load(directory)
