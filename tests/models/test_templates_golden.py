"""Chat templates render as with transformers (tests/reference/make_templates.py)."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import tokenizers

from dance_jax.models import chat_renderer
from dance_jax.models.chat_template import TemplateRefusal
from dance_jax.models.tokenizer import Tokenizer
from tests.reference.conversations import CONVERSATIONS, NOW, SPECIAL, Message, for_transformers

TEMPLATES = pathlib.Path(__file__).parent.parent / "reference" / "templates"
#: Text, {"refused": reason} or null of each template and conversation.
EXPECTED: dict[str, dict[str, Any]] = json.loads((TEMPLATES / "expected.json").read_text())["texts"]
#: Templates that drop a message of a conversation, which transformers lets pass and we refuse.
DROPS = {
    "two systems": {"deepseek_r1", "gpt_oss", "minimax_m2"},
    "an unknown role": {
        *("deepseek_r1", "deepseek_v3", "ernie", "glm4_5", "gpt_oss"),
        *("minimax_m2", "olmoe", "qwen2_5", "qwen3"),
    },
}
#: What transformers refuses, and what we render without the thought.
RENDERED = {"calls with content and thought": {"gpt_oss"}}
#: Templates that drop results of tools.
WITHOUT_TOOLS = {"ernie", "olmoe"}
#: Runs the renderer with a clock that stands still.
FROZEN = """
import datetime, runpy
class Frozen(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return {now!r}
datetime.datetime = Frozen
runpy.run_path({renderer!r}, run_name="__main__")
"""


@pytest.fixture(autouse=True)
def _frozen_clock(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "frozen.py"
    program.write_text(FROZEN.format(now=NOW, renderer=chat_renderer.__file__))
    monkeypatch.setattr(chat_renderer, "__file__", str(program))


def tokenizer_of(name: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    source = (TEMPLATES / f"{name}.jinja").read_text()
    return Tokenizer(backend, SPECIAL, source, (), name)


def drops(name: str, title: str) -> bool:
    """Whether a template drops a message of a conversation."""
    roles = {message["role"] for message in CONVERSATIONS[title].messages}
    return name in DROPS.get(title, ()) or (name in WITHOUT_TOOLS and "tool" in roles)


def rendered(tokenizer: Tokenizer, messages: list[Message], variables: dict[str, Any]) -> Any:
    """What dance_jax makes of a conversation, in the form of `EXPECTED`."""
    try:
        return tokenizer.chat_text(messages, **variables)
    except TemplateRefusal as refusal:
        return {"refused": refusal.reason}


def test_all_pairs_are_there() -> None:
    assert sorted(EXPECTED) == sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
    assert {tuple(texts) for texts in EXPECTED.values()} == {tuple(CONVERSATIONS)}


@pytest.mark.parametrize("name", EXPECTED)
def test_renders_as_transformers(name: str) -> None:
    """Messages of OpenAI's API and the same ones as transformers takes them give the same text."""
    tokenizer, wrong = tokenizer_of(name), {}
    for title, expected in EXPECTED[name].items():
        given = CONVERSATIONS[title]
        for messages in (given.messages, for_transformers(given.messages, name)):
            got = rendered(tokenizer, messages, given.variables)
            if drops(name, title):
                assert got["refused"].startswith("it drops messages["), title
            elif name in RENDERED.get(title, ()):
                assert "refused" in expected and "I look." in got
            elif expected is not None and got != expected:
                wrong[title] = {"transformers": expected, "dance_jax": got}
    assert not wrong, json.dumps(wrong, ensure_ascii=False, indent=1)
