"""Incremental detokenization: whole characters only, cut off at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

#: What decoders write for bytes that are not, or not yet, a character.
_OPEN = "\ufffd"
#: Prompt tokens searched for a context (a token's leading space depends on the token before).
_LONGEST_CONTEXT = 32
#: The window is shortened when it has more tokens than this.
_LONG = 4
#: A character has at most 4 bytes: after 4 tokens without a new character, some bytes are invalid.
_PATIENCE = 4


class Decoder(Protocol):
    """Any tokenizer, byte-level BPE or SentencePiece with byte fallback."""

    def decode(self, ids: list[int], /, skip_special_tokens: bool = True) -> str: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def to_json(self) -> str: ...

    def special_ids(self) -> list[int]: ...


class Detokenizer:
    """The growing text of one sample.

    `append` and `finish` return new text, which concatenates to the sample's text; returned text is
    never revised. A character is returned once its last byte has arrived, and the beginning of a
    possible stop string once it turns out not to be one. An incomplete character at the end of the
    output is dropped. Each token costs two decodes of a few tokens.

    Args:
        decoder: decodes token ids; called for short runs only.
        prompt_token_ids: the tokens that the output continues.
        stop: stop strings, each non-empty.
        min_tokens: a stop string that is complete within this many tokens is ignored.
        keep_stop: whether the stop string that ends the text is part of it.
        skip_special_tokens: whether special tokens are left out.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        keep_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._decoder = decoder
        self._skips = skip_special_tokens
        self._keep_stop = keep_stop
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        #: The last tokens, and the part of their text already read: all but open bytes at the end.
        self._window, self._read = self._context(list(prompt_token_ids[-_LONGEST_CONTEXT:]))
        #: Tokens since the window's text last grew.
        self._idle = 0
        #: Text held back because it may be the beginning of a stop string.
        self._held = ""
        #: The stop string that ended the text.
        self.stopped_by: str | None = None

    def append(self, token: int) -> str:
        """Add a token and return the new text; check `stopped_by` afterwards."""
        self._num_tokens += 1
        self._window.append(token)
        return self._pass_on(self._decode())

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        rest, self._held = self._held, ""
        return rest

    def _decode(self) -> str:
        """The window's new whole characters."""
        text = self._text(self._window)
        # Byte-level decoders write one U+FFFD for an open character. Byte fallback writes one for
        # every byte, even for those of whole characters just before the open one.
        whole = text.rstrip(_OPEN)
        if len(whole) > len(self._read):
            new = whole[len(self._read) :]
            self._read, self._idle = whole, 0
            if len(self._window) > _LONG:
                self._window, self._read = self._context(self._window)
            return new
        self._idle += 1
        if self._idle < _PATIENCE or len(text) <= len(self._read) + 1:
            return ""
        # Only the last U+FFFD can still become a character; it lies within the last tokens.
        new = text[len(self._read) : -1]
        self._window, self._idle = self._window[-_PATIENCE:], 0
        self._read = self._text(self._window)[:-1]
        return new

    def _text(self, tokens: list[int]) -> str:
        return self._decoder.decode(tokens, skip_special_tokens=self._skips)

    def _context(self, tokens: list[int]) -> tuple[list[int], str]:
        """The fewest last tokens whose text has a whole character, and that text.

        The text may begin with U+FFFD, for the end of a character that the cut splits; adding
        tokens does not change that.
        """
        for count in range(1, len(tokens) + 1):
            whole = self._text(tokens[-count:]).rstrip(_OPEN)
            if whole:
                return tokens[-count:], whole
        return [], ""

    def _pass_on(self, new: str) -> str:
        """Text that neither is nor can become part of a stop string."""
        if not self._stop or not new:
            return new
        text = self._held + new
        if self._num_tokens > self._min_tokens:
            found = [
                (at, stop)
                for stop in self._stop
                # Search only for stop strings that end in the new text; earlier ones were found.
                if (at := text.find(stop, max(0, len(self._held) - len(stop) + 1))) >= 0
            ]
            if found:
                at, self.stopped_by = min(found, key=lambda place: place[0])
                self._held = ""
                return text[: at + len(self.stopped_by) * self._keep_stop]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
