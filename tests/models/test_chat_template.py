"""Chat templates are programs of strangers: they run in a process with limits."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import psutil
import pytest

from dance_jax.config import UserError
from dance_jax.models.chat_template import ChatTemplate, TemplateRefusal, TemplateTooCostly

NAMES: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
#: A template that is costly only for some messages.
ON_DEMAND = "{% if messages[0].content == 'bomb' %}{{ 'a' * 10 ** 10 }}{% endif %}fine"


def process_of(template: ChatTemplate) -> psutil.Process:
    assert template._renderer is not None
    return psutil.Process(template._renderer._process.pid)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 2000000000 }}",
        "{{ '%3000000000d' % 1 }}",
        "{{ '{:3000000000}'.format(1) }}",
        "{{ 'a' | center(3 * 10 ** 9) }}",
        "{{ messages | tojson(indent=10 ** 9) }}",
        "{{ 'a'.replace('', 'b' * 100000).replace('', 'c' * 100000) }}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}{{ n.x }}",
        "{{ range(99999) | batch(10 ** 9, 'x') | list }}",
    ],
)
def test_memory_is_limited(source: str) -> None:
    with pytest.raises(TemplateTooCostly, match=r"file: .* more than 512 MiB of memory"):
        ChatTemplate(source, "file").render(NAMES)


def test_the_text_is_limited() -> None:
    template = ChatTemplate("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "file")
    with pytest.raises(TemplateTooCostly, match="longer than 8388608 characters"):
        template.render(NAMES)


@pytest.mark.slow
def test_time_is_limited() -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateTooCostly, match="more than 5 s of CPU time"):
        ChatTemplate(loop, "file").render(NAMES)


@pytest.mark.parametrize(
    "source",
    ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ " + "9" * 5000 + " }}", "a\n{% if %}"],
)
def test_what_cannot_be_parsed_is_refused_at_once(source: str) -> None:
    with pytest.raises(UserError, match="file: chat template"):
        ChatTemplate(source, "file")


@pytest.mark.parametrize(
    "source",
    ["{{ 1" + "+1" * 20_000 + " }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"],
)
def test_deep_nesting_is_refused(source: str) -> None:
    with pytest.raises(UserError, match=r"file: chat template: .*recursion"):
        ChatTemplate(source, "file").render(NAMES)


def test_a_costly_text_does_not_affect_the_next() -> None:
    template = ChatTemplate(ON_DEMAND, "file")
    for _ in range(2):
        with pytest.raises(TemplateTooCostly):
            template.render({"messages": [{"role": "user", "content": "bomb"}]})
        assert template.render(NAMES) == "fine"


def test_one_process_renders_all_texts() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ x / y }}", "file")
    names = NAMES | {"x": 6, "y": 3}
    assert template.render(names) == "hi2.0"
    process = process_of(template)
    with pytest.raises(TemplateRefusal, match="division by zero"):
        template.render(names | {"y": 0})
    with pytest.raises(UserError, match="messages: must be text, numbers"):
        template.render({"messages": [object()]})
    assert template.render(names | {"messages": [{"content": "\ud83d é"}]}) == "\ud83d é2.0"
    assert process_of(template) == process or not process.is_running()


def test_a_killed_process_is_replaced() -> None:
    template = ChatTemplate("fine", "file")
    template.render(NAMES)
    process_of(template).kill()
    process_of(template).wait(10)
    assert template.render(NAMES) == "fine"


def test_the_process_ends_with_the_template() -> None:
    template = ChatTemplate("fine", "file")
    template.render(NAMES)
    process = process_of(template)
    del template
    process.wait(10)
    assert not process.is_running()


def test_the_process_ends_with_a_killed_parent() -> None:
    program = (
        "from dance_jax.models.chat_template import ChatTemplate\n"
        "template = ChatTemplate('fine', 'file')\n"
        "template.render({})\n"
        "print(template._renderer._process.pid, flush=True)\n"
        "input()\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe) as parent:
        assert parent.stdout is not None
        renderer = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
        renderer.wait(10)
    assert not renderer.is_running()
