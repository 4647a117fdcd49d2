"""Tokenizers and chat templates."""

import json

import pytest

from dance_jax.config import UserError
from dance_jax.models import model_config
from dance_jax.models.directory import read_config
from dance_jax.models.random_weights import write_byte_tokenizer
from dance_jax.models.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "hi <b> é"}]


@pytest.fixture
def directory(tmp_path, deepseek_fields):
    (tmp_path / "config.json").write_text(json.dumps(deepseek_fields))
    write_byte_tokenizer(tmp_path, model_config(deepseek_fields))
    return tmp_path


def settings(directory, **changes):
    path = directory / "tokenizer_config.json"
    values = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != "absent"}
    path.write_text(json.dumps(values))
    return Tokenizer.load(directory)


def with_begin_token(directory):
    """Change tokenizer.json so that it adds <s>."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(content))


def test_files_that_are_no_tokenizer(directory):
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja"):
        Tokenizer.load(directory)
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="bos_token is 5"):
        settings(directory, bos_token=5)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(directory)
    with pytest.raises(UserError, match="nowhere: no such directory"):
        Tokenizer.load(directory / "nowhere")


def test_round_trip(directory):
    tokenizer = Tokenizer.load(directory)
    text = "héllo ☃\n  x"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.decode([0, *ids, 1]) == text
    assert tokenizer.decode([1], skip_special_tokens=False) == "</s>"
    assert tokenizer.vocab_size == 258 and tokenizer.eos_token_ids == (1,)


@pytest.mark.parametrize("processor", [False, True])
@pytest.mark.parametrize(("add", "begins"), [(True, True), (False, False), ("absent", None)])
def test_add_bos_token(directory, processor, add, begins):
    if processor:
        with_begin_token(directory)
    tokenizer = settings(directory, add_bos_token=add)
    begins = processor if begins is None else begins
    assert tokenizer.encode("ab")[:-2] == [0] * begins
    assert tokenizer.encode("ab", add_special_tokens=False)[:-2] == []


def test_add_bos_token_spelled_as_an_object(directory):
    tokenizer = settings(directory, add_bos_token=True, bos_token={"content": "<s>"})
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 0
    with pytest.raises(UserError, match="bos_token is not in"):
        settings(directory, bos_token="<nothing>")


def test_generation_config_goes_first_for_eos(directory):
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    assert Tokenizer.load(directory).eos_token_ids == (1, 9)


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({"eos_token": "<s>"}, (1, 0)),
        ({"eos_token": {"content": "<s>"}}, (1, 0)),
        ({"eos_token": "z", "added_tokens_decoder": {"7": {"content": "z"}}}, (1, 7)),
        ({"eos_token": "z", "added_tokens_decoder": {"999999": {"content": "z"}}}, (1,)),
        ({"eos_token": "<unheard of>"}, (1,)),
        ({"eos_token": None}, (1,)),
    ],
)
def test_the_tokenizers_own_end_token_ends_too(directory, changes, ends):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert read_config(directory).eos_token_ids == ends


def test_added_tokens_may_be_above_the_vocabulary(directory):
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    size = 258
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": size, "content": "<image>", "special": True, **flags})
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer.load(directory)
    assert max(tokenizer.encode("a<image>")) >= size > max(tokenizer.encode("a"))


def test_chat_template(directory):
    tokenizer = Tokenizer.load(directory)
    text = "user: hi <b> é\nassistant:"
    assert tokenizer.chat_text(MESSAGES) == text
    assert tokenizer.chat_text(MESSAGES, add_generation_prompt=False) == "user: hi <b> é\n"


def test_template_file_goes_first_and_sees_what_templates_rely_on(directory):
    (directory / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "{{ m | tojson }}{% generation %}x{% endgeneration %}{% endfor %}{{ strftime_now('%%') }}"
        "{{ tools }}"
    )
    tokenizer = Tokenizer.load(directory)
    text = tokenizer.chat_text([{"role": "skip", "content": ""}, *MESSAGES], tools=3)
    assert text == '<s>{"role": "user", "content": "hi <b> é"}x%3'


def test_begin_token_of_a_template_is_not_doubled(directory):
    tokenizer = settings(
        directory, add_bos_token=True, chat_template="{{ bos_token }}{{ messages[0].content[0] }}"
    )
    text = tokenizer.chat_text(MESSAGES)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokens == [0, tokenizer.encode("h")[-1]]


def test_named_templates(directory):
    template = "d{{ messages[0].content }}"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": template}]
    assert settings(directory, chat_template=named).chat_text(MESSAGES) == "dhi <b> é"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ messages.append(1) }}", "unsafe|not safe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
    ],
)
def test_templates_that_refuse_or_break_out(directory, template, message):
    tokenizer = settings(directory, chat_template=template)
    with pytest.raises(UserError, match=message):
        tokenizer.chat_text(MESSAGES)


def test_bad_files(directory):
    with pytest.raises(UserError, match="line 2"):
        settings(directory, chat_template="a\n{% if %}")
    tokenizer = settings(directory, chat_template="absent")
    assert not tokenizer.has_chat_template
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.chat_text(MESSAGES)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(UserError, match=r"token 257, but vocab_size is 100"):
        Tokenizer.load(directory)
    path = directory / "tokenizer.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(UserError, match=r"tokenizer\.json.*damaged"):
        Tokenizer.load(directory)
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(directory)
