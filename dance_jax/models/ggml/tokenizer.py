"""Converts a GGUF file's vocabulary to tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from dance_jax.config import UserError

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_KEY = "tokenizer.ggml."

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
#: Splits words, then numbers of a given count of digits, then other characters.
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES


def _cased(less: str = "") -> str:
    """Like _WORDS with three digits, but a word also ends where lower case becomes upper case.

    Args:
        less: characters to exclude from the letters, as part of a character class.
    """
    upper, lower = (
        rf"[{case}\p{{Lm}}\p{{Lo}}\p{{M}}{less}]" for case in (r"\p{Lu}\p{Lt}", r"\p{Ll}")
    )
    before, end = r"[^\r\n\p{L}\p{N}]?", rf"{_CONTRACTIONS}?"
    return rf"{before}{upper}*{lower}+{end}|{before}{upper}+{lower}*{end}|\p{{N}}{{1,3}}"


#: Ranges of letters that form words in DeepSeek-LLM's tokenizer.
_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CHINESE_JAPANESE = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"


@dataclasses.dataclass(frozen=True)
class _Words:
    """How text is split before pairs are merged, and other settings implied by the split's name."""

    #: Regular expressions, applied one after the other. Empty for GPT-2's, built into `tokenizers`.
    patterns: tuple[str, ...] = ()
    #: Characters are composed (NFC) before the split.
    composed: bool = False
    #: A word that is itself a token is used whole, without merging pairs.
    whole: bool = False
    #: Text begins with the BOS token unless the file says otherwise.
    begins: bool = False


_GPT2 = _Words()
_QWEN2 = _Words((_WORDS % "",), composed=True)
#: Like Qwen2's, but combining marks are parts of words.
_MARKED = (
    (_WORDS % "")
    .replace(r"?\p{L}+", r"?[\p{L}\p{M}]+")
    .replace(r"?[^\s\p{L}\p{N}]", r"?[^\s\p{L}\p{M}\p{N}]")
)
_LLAMA3 = _Words((_WORDS % "{1,3}",), whole=True, begins=True)
_GPT4O = _Words((_cased() + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES,))
#: Splits by the value of tokenizer.ggml.pre.
_PRE = {
    "chatglm-bpe": _Words((_WORDS % "{1,3}",)),
    "deepseek-coder": _Words(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}")),
    "deepseek-llm": _Words(
        (
            "[\r\n]",
            rf"\s?[{_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _ASIAN,
            r"\p{N}+",
        )
    ),
    "deepseek-r1-qwen": _QWEN2,
    "deepseek-v3": _Words(
        (
            r"\p{N}{1,3}",
            _CHINESE_JAPANESE,
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
            r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES,
        )
    ),
    "default": _GPT2,
    "glm4": _Words((_WORDS % "{1,3}",), whole=True),
    "gpt-2": _GPT2,
    "gpt-4o": _GPT4O,
    "kimi-k2": _Words(
        (r"[\p{Han}]+|" + _cased(less=r"&&[^\p{Han}]") + r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES,)
    ),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "llama4": _GPT4O,
    "minimax-m2": _GPT4O,
    "olmo": _Words(composed=True),
    "qwen2": _QWEN2,
    "qwen35": _Words((_MARKED,), composed=True),
}


def tokenizer_files(metadata: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """The content of tokenizer.json and tokenizer_config.json.

    Args:
        path: the file's path, for messages.

    Raises:
        UserError: a key is missing, or its value is not supported.
    """
    vocabulary = _Vocabulary(metadata, path)
    kind = vocabulary.get("model")
    if kind not in _MODELS:
        raise UserError(
            f"{path}: {_KEY}model is {kind!r}; supported: {', '.join(map(repr, _MODELS))}"
        )
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": vocabulary.added(),
            "post_processor": None,
            **_MODELS[kind](vocabulary),
        },
        "tokenizer_config.json": _settings(vocabulary, kind),
    }


class _Vocabulary:
    """The vocabulary keys of the metadata."""

    def __init__(self, metadata: dict[str, Any], path: pathlib.Path):
        self._metadata = metadata
        self.path = path
        self.texts: list[str] = self.list("tokens")
        self.kinds: list[int] = self.list("token_type", required=False) or [1] * len(self.texts)
        if len(self.kinds) != len(self.texts):
            raise UserError(
                f"{path}: {len(self.texts)} {_KEY}tokens, but {len(self.kinds)} {_KEY}token_type"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a vocabulary key."""
        return self._metadata.get(_KEY + key, default)

    def list(self, key: str, required: bool = True) -> list[Any]:
        """The list under a key. Empty if the key is missing and not required."""
        value = self.get(key)
        if isinstance(value, list) and value:
            return value
        if value is not None and not isinstance(value, list):
            raise UserError(f"{self.path}: {_KEY}{key} is {value!r}; expected a list")
        if required:
            raise UserError(f"{self.path}: {_KEY}{key} is missing: the file has no tokenizer")
        return []

    def numbers(self) -> dict[str, int]:
        """Token ids by text, without the unused tokens that pad the embedding."""
        return {
            text: number
            for number, (text, kind) in enumerate(zip(self.texts, self.kinds, strict=True))
            if kind != _UNUSED
        }

    def special(self, name: str) -> str | None:
        """Text of a special token. None if the file does not name the token."""
        number = self.get(f"{name}_token_id")
        if number is None:
            return None
        if not isinstance(number, int) or not 0 <= number < len(self.texts):
            raise UserError(
                f"{self.path}: {_KEY}{name}_token_id is {number!r}; there are {len(self.texts)} "
                "tokens"
            )
        return self.texts[number]

    def added(self) -> list[dict[str, Any]]:
        """Tokens that are matched in the text before it is split into words."""
        return [
            {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != _USER_DEFINED,
            }
            for number, (text, kind) in enumerate(zip(self.texts, self.kinds, strict=True))
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]

    def words(self) -> _Words:
        """How text is split."""
        name = self.get("pre", "default")
        if name not in _PRE:
            raise UserError(
                f"{self.path}: {_KEY}pre is {name!r}; supported: {', '.join(sorted(_PRE))}"
            )
        return _PRE[name]


def _byte_pairs(vocabulary: _Vocabulary) -> dict[str, Any]:
    """A GPT-2-style BPE tokenizer: bytes as printable characters, and a list of pairs to merge."""
    words = vocabulary.words()
    splits = [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        for pattern in words.patterns
    ]
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "normalizer": {"type": "NFC"} if words.composed else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*splits, letters | {"use_regex": not words.patterns}],
        },
        "decoder": letters | {"use_regex": True},
        "model": _model(
            vocabulary.numbers(),
            [pair.split(" ", 1) for pair in vocabulary.list("merges", required=False)],
            ignore_merges=words.whole,
        ),
    }


def _sentence_pieces(vocabulary: _Vocabulary) -> dict[str, Any]:
    """A SentencePiece BPE tokenizer: the pair whose token has the highest score is merged first."""
    numbers = vocabulary.numbers()
    scores = vocabulary.list("scores")
    if len(scores) != len(vocabulary.texts):
        raise UserError(
            f"{vocabulary.path}: {len(vocabulary.texts)} {_KEY}tokens, but {len(scores)} "
            f"{_KEY}scores"
        )
    merges = []
    for text, number in numbers.items():
        if vocabulary.kinds[number] not in (_UNKNOWN, _CONTROL, _BYTE):
            pairs = ((text[:i], text[i:]) for i in range(1, len(text)))
            known = [pair for pair in pairs if pair[0] in numbers and pair[1] in numbers]
            known.sort(key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))
            merges += [(-scores[number], pair) for pair in known]
    merges.sort(key=lambda merge: merge[0])
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefixed = vocabulary.get("add_space_prefix", True)
    begin = [{"type": "Prepend", "prepend": "▁"}] if prefixed else []
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*begin, space]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": _model(
            numbers,
            [list(pair) for _, pair in merges],
            unk_token=vocabulary.special("unknown"),
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _model(vocab: dict[str, int], merges: list[list[str]], **more: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
        **more,
    }


#: Tokenizer builders by the value of tokenizer.ggml.model.
_MODELS = {"gpt2": _byte_pairs, "llama": _sentence_pieces}


def _settings(vocabulary: _Vocabulary, kind: str) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    begins = kind == "llama" or vocabulary.words().begins
    settings: dict[str, Any] = {
        "add_bos_token": vocabulary.get("add_bos_token", begins),
        "add_eos_token": vocabulary.get("add_eos_token", False),
    }
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for theirs, ours in names.items():
        if (text := vocabulary.special(theirs)) is not None:
            settings[f"{ours}_token"] = text
    return settings
