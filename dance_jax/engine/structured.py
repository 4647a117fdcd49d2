"""Structured outputs: texts that follow a JSON schema, a regular expression or a grammar.

llguidance does the work: it tells which tokens may come next, and follows the tokens chosen.
"""

from __future__ import annotations

import concurrent.futures
import json
import re
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from dance_jax.config import UserError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from dance_jax.engine.detokenizer import Decoder

#: Whitespace between the parts of a JSON text: a line's end with an indentation. Without a limit,
#: some models write spaces until the output is full.
_WHITESPACE = r"[ \n\t]{1,40}"
#: Grammars whose compiled form is kept for the next request with the same one.
_KEPT = 16
#: Most characters of a regular expression or grammar, and of a schema as JSON.
MAX_GRAMMAR, MAX_SCHEMA = 1 << 16, 1 << 20
#: Seconds that masks of one output may take: at the beginning, and for each token.
_PATIENCE_S, _TOKEN_S = 1.0, 0.005
#: Most characters of llguidance's reasons that users get.
_REASON = 300
#: Characters of the output in which the beginning of the structured part is looked for.
_TAIL = 256


class StructuredOutputsParams(msgspec.Struct, kw_only=True):
    """What an output must be, in exactly one of the ways; names are vLLM's.

    Raises:
        UserError: not exactly one way is given, or a value has a wrong type.
    """

    #: A JSON schema, as an object or as text.
    json: dict[str, Any] | str | None = None
    #: Any JSON object.
    json_object: bool | None = None
    #: A regular expression, in the syntax of Rust's regex crate.
    regex: str | None = None
    #: One of these texts.
    choice: list[str] | None = None
    #: A grammar, in the syntax of Lark or in llama.cpp's GBNF.
    grammar: str | None = None
    #: Whether keywords of the schema that are not supported are ignored.
    lenient: bool = False
    #: A regular expression: the output is free until the expression matches in it, for models that
    #: think first. None: the output is structured from its beginning.
    begins_after: str | None = None
    #: Two texts: an output that begins with the first is structured after the second, for models
    #: that may think first. None: all outputs are structured from their beginning.
    may_begin_with: list[str] | None = None
    #: A text, or the id of a special token: an output that begins with it (after what the model
    #: thinks) is free, for models that may call a tool instead. None: no output is free.
    unless_begins_with: str | int | None = None

    def __post_init__(self) -> None:
        ways = ("json", "json_object", "regex", "choice", "grammar")
        given = [name for name in ways if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise UserError(
                f"structured_outputs: must have exactly one of {', '.join(ways)}; "
                f"got {', '.join(given) or 'none'}"
            )
        texts = self.choice
        listed = isinstance(texts, list) and all(isinstance(each, str) for each in texts)
        if texts is not None and not (texts and listed):
            raise UserError(
                f"structured_outputs.choice: must be a list of texts; got {texts!r:.80}"
            )
        for name, kind in (("regex", str), ("grammar", str), ("json", (dict, str))):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                wanted = "an object or its JSON" if name == "json" else "a text"
                raise UserError(f"structured_outputs.{name}: must be {wanted}; got {value!r:.80}")
            if isinstance(value, str) and len(value) > (most := _most(name)):
                raise UserError(
                    f"structured_outputs.{name}: has {len(value)} characters; at most {most} are "
                    "allowed"
                )

    def compiled(self) -> str:
        """The grammar in llguidance's form.

        Raises:
            UserError: the schema, expression or grammar is wrong; the message says where.
        """
        own, other = self._own_grammar(), self.unless_begins_with
        if self.may_begin_with is None and other is None:
            return own
        thought, rules, answer = "", [], "@structure"
        if self.may_begin_with is not None:
            begin, end = map(json.dumps, self.may_begin_with)
            thought = "(thought SPACE?)? "
            rules += [f"thought: {begin} thinking", f"thinking[suffix={end}]: /(.|\\n)*/"]
            rules.append(r"SPACE: /\s+/")
        if other is not None:
            answer = "(@structure | other)"
            begin = f"<[{other}]>" if isinstance(other, int) else json.dumps(other)
            rules.append(f"other: {begin} <[*]>*")
        lark = "\n".join([f"start: {thought}{answer}", *rules])
        first, *others = _grammars(own)
        named = [{"lark_grammar": lark}, first | {"name": "structure"}, *others]
        return json.dumps({"grammars": named})

    def _own_grammar(self) -> str:
        """The grammar of the structured part."""
        import llguidance

        schema = {"type": "object"} if self.json_object else self.json
        if schema is not None:
            options: Any = {"whitespace_pattern": _WHITESPACE, "lenient": self.lenient}
            try:
                schema = json.loads(schema) if isinstance(schema, str) else schema
                text = json.dumps({} if schema is True else schema)
                if not isinstance(schema, dict) and schema is not True:
                    raise ValueError("a schema is an object")
                return llguidance.LLMatcher.grammar_from_json_schema(text, defaults=options)
            except (ValueError, TypeError, RecursionError) as error:
                reason = _short(str(error))
                raise UserError(f"structured_outputs.json: not a JSON schema: {reason}") from error
        if self.regex is not None:
            return llguidance.LLMatcher.grammar_from_regex(self.regex)
        if self.choice is not None:
            return llguidance.grammar_from("choice", json.dumps(self.choice))
        try:
            return llguidance.grammar_from("grammar", self.grammar or "")
        except ValueError as error:
            raise UserError(f"structured_outputs.grammar: {_short(str(error))}") from error

    def check(self) -> None:
        """Check that the structure is one that llguidance can follow.

        Raises:
            UserError: it is not; the message says why.
        """
        import llguidance

        wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(self.compiled())
        if wrong:
            raise UserError(f"structured_outputs: {_short(messages[0])}")


def _most(name: str) -> int:
    return MAX_SCHEMA if name == "json" else MAX_GRAMMAR


def _short(reason: str) -> str:
    """A reason of llguidance's without the state of its parser."""
    return reason.partition("<state")[0].strip()[:_REASON]


def _grammars(compiled: str) -> list[dict[str, Any]]:
    """The grammars of llguidance's form, which is JSON or Lark."""
    if compiled.lstrip().startswith("{"):
        return json.loads(compiled)["grammars"]
    return [{"lark_grammar": compiled}]


class Structure:
    """The structure of one sample's output, as far as it has been written.

    Args:
        matcher: the matcher, at its beginning; it may still be in preparation.
        begins_after: see `StructuredOutputsParams`.
        decode: the text of a token, special tokens included.
        ends: bits of the tokens that end an output, int32 [w].
        special: bits of the special tokens, int32 [w]; they are not text, whatever their names.
        tokens: the output so far.
    """

    def __init__(
        self,
        matcher: concurrent.futures.Future[LLMatcher],
        begins_after: str | None,
        decode: Callable[[int], str],
        ends: np.ndarray,
        special: np.ndarray,
        tokens: Sequence[int] = (),
    ) -> None:
        self._future = matcher
        self._ends_w, self._special_w = ends, special
        #: Seconds that the masks have taken, and their number.
        self._spent_s, self._masks = 0.0, 0
        self._begins_after = None if begins_after is None else re.compile(begins_after)
        self._decode = decode
        self._tail = ""
        #: Tokens that the matcher has not seen.
        self._ahead: list[int] = []
        for token in tokens:
            self._take(token)

    @property
    def ready(self) -> bool:
        """Whether the matcher is prepared."""
        return self._future.done()

    @property
    def restricts(self) -> bool:
        """Whether the structured part of the output has begun."""
        return self._begins_after is None

    @property
    def ended(self) -> bool:
        """Whether the structure is complete, and nothing can follow."""
        if not self.restricts:
            return False
        matcher = self._matcher()
        return matcher.is_stopped() and not matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why the structure cannot be followed; None if it can."""
        failed = self._future.exception()
        reason = _short(self._matcher().get_error() if failed is None else str(failed))
        if not reason and self._spent_s > _PATIENCE_S + _TOKEN_S * self._masks:
            reason = "too many ways to go on; write it with less ambiguity"
        return f"structured_outputs: cannot be followed: {reason}" if reason else None

    def append(self, token: int) -> None:
        """Follow a token that was chosen."""
        self._take(token)
        if self.restricts:
            self._matcher()

    def fill(self, words_w: np.ndarray) -> None:
        """Write the tokens that may come next.

        Args:
            words_w: int32, contiguous, one bit per token id.
        """
        if self._future.exception() is not None:
            words_w[:] = -1
            return
        began = time.perf_counter()
        matcher = self._matcher()
        matcher.unsafe_compute_mask_ptr(words_w.ctypes.data, words_w.nbytes)
        ends_w = words_w & self._ends_w if matcher.is_accepting() else 0
        words_w &= ~self._special_w
        words_w |= ends_w
        self._spent_s += time.perf_counter() - began
        self._masks += 1

    def _take(self, token: int) -> None:
        if self._begins_after is None:
            self._ahead.append(token)
            return
        self._tail = (self._tail + self._decode(token))[-_TAIL:]
        if self._begins_after.search(self._tail):
            self._begins_after = None

    def _matcher(self) -> LLMatcher:
        """The matcher, which has followed all tokens."""
        matcher = self._future.result()
        if self._ahead:
            matcher.consume_tokens(self._ahead)
            self._ahead.clear()
        return matcher


class Structures:
    """Prepares matchers, on a thread of its own: a large grammar takes up to a second.

    Args:
        decoder: the tokenizer.
        vocab_size: upper bound of token ids, exclusive.
        eos_token_ids: the tokens that end an output.
    """

    def __init__(self, decoder: Decoder, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._decoder = decoder
        self._vocab_size, self._eos = vocab_size, list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        #: By compiled grammar, the oldest first.
        self._kept: dict[str, LLMatcher] = {}
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "grammars")

    def matcher(self, params: StructuredOutputsParams) -> concurrent.futures.Future[LLMatcher]:
        """A new matcher, once it is prepared."""
        return self._executor.submit(self._prepare, params)

    def _prepare(self, params: StructuredOutputsParams) -> LLMatcher:
        import llguidance

        if self._tokenizer is None:
            self._tokenizer = llguidance.LLTokenizer(
                self._decoder.to_json(), n_vocab=self._vocab_size, eos_token=self._eos or None
            )
        grammar = params.compiled()
        kept = self._kept.pop(grammar, None)
        if kept is None:
            kept = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
            # The first mask of a grammar takes the longest.
            kept.compute_bitmask()
        self._kept[grammar] = kept
        if len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]
        return kept.deep_copy()
