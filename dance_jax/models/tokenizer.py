"""Tokenizer and chat template of a model, from the files in its directory."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

from dance_jax.config import UserError
from dance_jax.models.chat_template import ChatTemplate, TemplateRefusal, TemplateTooCostly
from dance_jax.models.conversation import Conversation
from dance_jax.models.directory import (
    check_no_pointer,
    json_object,
    model_directory,
    read_config,
    side_files,
)

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


class Tokenizer:
    """A model's tokenizer; create with `Tokenizer.load`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: dict[str, Any],
        template: str | None,
        eos_token_ids: Sequence[int],
        where: str,
    ):
        self._backend = backend
        self._settings = settings
        self._where = where
        self._special = {
            name: _text(settings[name], f"{where}: {name}")
            for name in _SPECIAL
            if settings.get(name)
        }
        #: The chat template's source; None if the model has none.
        self.template = template
        self._conversation = (
            None if template is None else Conversation(ChatTemplate(template, where))
        )
        #: Token ids that end a sequence.
        self.eos_token_ids = tuple(eos_token_ids)
        bos, eos = self._special.get("bos_token"), self._special.get("eos_token")
        self.bos_token_id = backend.token_to_id(bos) if bos else None
        self._eos_token_id = backend.token_to_id(eos) if eos else None
        for name, token in (
            ("add_bos_token", self.bos_token_id),
            ("add_eos_token", self._eos_token_id),
        ):
            if settings.get(name) and token is None:
                raise UserError(
                    f"{where}: {name} is true, but {name[4:]} is not in tokenizer.json: correct "
                    "one of the files"
                )

    @staticmethod
    def load(
        directory: str | pathlib.Path, chat_template: tuple[str, str] | None = None
    ) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json, the chat template and the config's EOS.

        Args:
            directory: a directory in Hugging Face format, a converted model, or a GGUF file.
            chat_template: a template to use instead of the model's, and where it is from.

        Raises:
            UserError: a file is missing or damaged, or there are more tokens than the model has.
        """
        directory = model_directory(directory)
        files = side_files(directory)
        path = directory / "tokenizer.json"
        if "tokenizer.json" not in files:
            raise UserError(f"{path}: no such file; {_how_to_make(directory)}")
        check_no_pointer(files["tokenizer.json"], path)
        try:
            backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a tokenizer, or damaged: {error}") from error
        config = read_config(directory)
        # Added tokens may be above: of images, for example, which the model never sees.
        top = max(backend.get_vocab(with_added_tokens=False).values(), default=-1)
        if top >= config.vocab_size:
            raise UserError(f"{path}: has token {top}, but vocab_size is {config.vocab_size}")
        settings, older = (
            json_object(files.get(name, b"{}"), directory / name)
            for name in ("tokenizer_config.json", "special_tokens_map.json")
        )
        template, where = chat_template or _template(directory, files, settings)
        eos = config.eos_token_ids
        return Tokenizer(backend, {**older, **settings}, template, eos, where)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including special tokens."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """True if `chat_text` can be used."""
        return self._conversation is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Encode a prompt.

        With `add_special_tokens`, BOS and EOS tokens are added according to add_bos_token and
        add_eos_token in tokenizer_config.json; if both are absent, according to tokenizer.json.

        Raises:
            UserError: the text contains half of a surrogate pair, which is not a character.
        """
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise UserError(
                "prompt: contains half of a surrogate pair, which is not a character; send valid "
                "Unicode text"
            )
        explicit = "add_bos_token" in self._settings or "add_eos_token" in self._settings
        own = add_special_tokens and not explicit
        # `encode_batch` releases the GIL, so that a long text does not block other threads.
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=own)
        ids = encoding.ids
        if add_special_tokens and self._settings.get("add_bos_token"):
            ids = [self.bos_token_id, *ids]
        if add_special_tokens and self._settings.get("add_eos_token"):
            ids = [*ids, self._eos_token_id]
        return ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Decode tokens to text; bytes that are not valid UTF-8 become U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def special_id(self, text: str) -> int | None:
        """The id of a special token; None if the text is none."""
        id = self._backend.token_to_id(text)
        return id if id in self.special_ids() else None

    def special_ids(self) -> list[int]:
        """The ids of the special tokens."""
        added = self._backend.get_added_tokens_decoder().items()
        return [id for id, token in added if token.special]

    def to_json(self) -> str:
        """The tokenizer in the form of tokenizer.json."""
        return self._backend.to_str()

    def chat_text(
        self,
        messages: Sequence[dict[str, Any]],
        /,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Render a conversation as the text of a prompt.

        Args:
            messages: messages with the fields of OpenAI's API; see `conversation.normalised`.
            add_generation_prompt: end with the beginning of the assistant's answer.
            continue_final_message: end where the last message ends, so that the answer goes on
                there; without the beginning of an answer of its own.
            variables: more variables for the template, for example tools.

        Raises:
            UserError: the model has no chat template, a message is wrong, or the template gives no
                text for the messages (`TemplateFailure`) or drops one of them.
        """
        if self._conversation is None:
            raise UserError(f"{self._where}: the model has no chat template")
        names = {"tools": None, "documents": None} | self._special | variables
        names["add_generation_prompt"] = add_generation_prompt and not continue_final_message
        return self._conversation.text(messages, names, continue_final_message)

    def check_chat_template(self) -> None:
        """Check that the chat template, if there is one, can be used within its limits.

        Raises:
            UserError: it cannot.
        """
        if self._conversation is None:
            return
        try:
            self.chat_text([{"role": "user", "content": "hello"}])
        except TemplateRefusal:
            return  # it may want other messages
        except TemplateTooCostly as error:
            raise UserError(f"{error}: correct the template, or remove it") from error


#: Files of tokenizers in other formats.
_OTHER_FORMATS = ("tokenizer.model", "tiktoken.model", "*.tiktoken", "vocab.json", "spiece.model")


def _how_to_make(directory: pathlib.Path) -> str:
    found = [path.name for pattern in _OTHER_FORMATS for path in directory.glob(pattern)]
    if not found:
        return "download it with the model"
    code = (
        "from transformers import AutoTokenizer as T; "
        f"T.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
    )
    return (
        f"make it from {found[0]}, once: pip install transformers sentencepiece tiktoken, then "
        f"python -c {shlex.quote(code)}"
    )


def _text(token: Any, where: str) -> str:
    """Text of a special token, which is given as text or as {"content": text}."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise UserError(f"{where} is {token!r}; expected a string")
    return text


def _template(
    directory: pathlib.Path, files: dict[str, bytes], settings: dict[str, Any]
) -> tuple[str | None, str]:
    """The model's chat template, if any, and where it is from; in transformers' order."""
    for name in ("chat_template.jinja", "additional_chat_templates/default.jinja"):
        if name in files:
            where = str(directory / name)
            check_no_pointer(files[name], directory / name)
            try:
                return files[name].decode("utf-8"), where
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: cannot be read: {error}") from error
    older = "chat_template.json"
    where = directory / "tokenizer_config.json"
    found = _default_template(settings.get("chat_template"), str(where))
    if found is None and older in files:
        where = directory / older
        fields = json_object(files[older], where)
        found = _default_template(fields.get("chat_template"), str(where))
    return found, str(where)


def _default_template(value: Any, where: str) -> str | None:
    """The chat template; from named templates, the one named "default"."""
    named = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    if named:
        chosen = (item.get("template") for item in named if item.get("name") == "default")
        value = next(chosen, None)
    if isinstance(value, dict):
        value = value.get("default")
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{where}: chat_template is neither a string nor a list with a template named default"
        )
    return value
