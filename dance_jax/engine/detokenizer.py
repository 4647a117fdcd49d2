"""Text from token ids, one token at a time: whole characters only, stop strings cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

#: What decoders write for bytes that are no (or not yet a) character.
_OPEN = "\ufffd"
#: Tokens that may be looked through for a context (leading spaces depend on the token before).
_LONGEST_CONTEXT = 32
#: The window is shortened when it is longer.
_LONG = 4
#: A character has at most 4 bytes: after so many tokens without one, some bytes are no character.
_PATIENCE = 4


class Decoder(Protocol):
    """Any tokenizer: byte-level BPE, or SentencePiece with byte fallback."""

    def decode(self, ids: list[int], /) -> str: ...


class Detokenizer:
    """The text of one sample as it grows.

    `append` and `finish` return new text; together they are the text, and nothing returned is ever
    taken back: a character is returned when its last byte has come, and the beginning of a
    possible stop string when it has turned out not to be one. Bytes of a character that the
    output's end leaves incomplete are dropped. Each token costs two decodes of a few tokens.

    Args:
        decoder: decodes token ids; only short runs are asked for.
        prompt_token_ids: what the output continues.
        stop: stop strings, not empty.
        min_tokens: a stop string that is complete within so many tokens does not count.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        #: Last tokens, and what of their text was passed on: all but open bytes at the end.
        self._window, self._read = self._context(list(prompt_token_ids[-_LONGEST_CONTEXT:]))
        #: Tokens since the window's text last grew.
        self._idle = 0
        #: Text that may be the beginning of a stop string.
        self._held = ""
        #: The stop string that ended the text.
        self.stopped_by: str | None = None

    def append(self, token: int) -> str:
        """New text with one more token; look at `stopped_by` afterwards."""
        self._num_tokens += 1
        self._window.append(token)
        return self._pass_on(self._decode())

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        rest, self._held = self._held, ""
        return rest

    def _decode(self) -> str:
        """New whole characters of the window."""
        text = self._decoder.decode(self._window)
        # An open character is one U+FFFD to byte-level decoders; byte fallback writes one for every
        # byte, even of the whole characters just before it.
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
        # Only the last U+FFFD can still become a character, and it is within the last tokens.
        new = text[len(self._read) : -1]
        self._window, self._idle = self._window[-_PATIENCE:], 0
        self._read = self._decoder.decode(self._window)[:-1]
        return new

    def _context(self, tokens: list[int]) -> tuple[list[int], str]:
        """The fewest last tokens with a whole character in their text, and this text.

        It may begin with U+FFFD, the end of a character cut off; more tokens do not change it.
        """
        for count in range(1, len(tokens) + 1):
            whole = self._decoder.decode(tokens[-count:]).rstrip(_OPEN)
            if whole:
                return tokens[-count:], whole
        return [], ""

    def _pass_on(self, new: str) -> str:
        """Text that is no part of a stop string, now and later."""
        if not self._stop or not new:
            return new
        text = self._held + new
        if self._num_tokens > self._min_tokens:
            found = [
                (at, stop)
                for stop in self._stop
                # Its end is new; what ended before was looked at before.
                if (at := text.find(stop, max(0, len(self._held) - len(stop) + 1))) >= 0
            ]
            if found:
                at, self.stopped_by = min(found, key=lambda place: place[0])
                self._held = ""
                return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of text that begin `stop`, fewer than all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
