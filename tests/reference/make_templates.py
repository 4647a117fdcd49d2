"""Makes templates/expected.json: what transformers makes of conversations with templates/*.jinja.

Run by hand, in an environment of its own (transformers is no dependency of dance_jax):
    pip install transformers==5.23.0 jinja2==3.1.6
    python tests/reference/make_templates.py
Each template there uses the constructs of a family's published templates, in words of our own. The
file has a text for each template and each conversation of conversations.py; {"refused": why} where
the template refuses the conversation; null where transformers fails otherwise.
"""

from __future__ import annotations

import datetime
import json
import pathlib
from typing import Any

import jinja2
import tokenizers
import transformers
from conversations import CONVERSATIONS, NOW, OF_NULL, SPECIAL, Conversation, for_transformers
from transformers.utils import chat_template_utils

TEMPLATES = pathlib.Path(__file__).parent / "templates"


class Frozen(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return NOW


def rendered(
    tokenizer: transformers.PreTrainedTokenizerFast, name: str, given: Conversation
) -> str | dict[str, str] | None:
    """The text of a conversation; or why the template refuses it; None: transformers fails."""
    variables: dict[str, Any] = {"add_generation_prompt": True} | given.variables
    if variables.get("continue_final_message"):
        variables["add_generation_prompt"] = False
    messages = for_transformers(given.messages, name)
    variables["chat_template"] = (TEMPLATES / f"{name}.jinja").read_text()
    try:
        if name not in OF_NULL:
            return tokenizer.apply_chat_template(messages, tokenize=False, **variables)
        # apply_chat_template removes null content, which earlier versions gave to templates.
        texts, _ = chat_template_utils.render_jinja_template([messages], **SPECIAL, **variables)
        return texts[0]
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        # raise_exception raises the class itself.
        return {"refused": str(error)} if type(error) is jinja2.TemplateError else None


def main() -> None:
    chat_template_utils.datetime = Frozen
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    names = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
    texts = {
        name: {title: rendered(tokenizer, name, each) for title, each in CONVERSATIONS.items()}
        for name in names
    }
    made = {"transformers": transformers.__version__, "jinja2": jinja2.__version__, "texts": texts}
    content = json.dumps(made, ensure_ascii=False, indent=1) + "\n"
    (TEMPLATES / "expected.json").write_text(content)


if __name__ == "__main__":
    main()
