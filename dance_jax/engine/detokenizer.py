"""Text from token ids, one token at a time: whole characters only, stop strings cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

#: What decoders write for bytes that are no (or not yet a) character.
_OPEN = "\ufffd"
#: Tokens of the prompt decoded together with the first output token (leading spaces depend on it).
_CONTEXT = 4
#: A character has at most 4 bytes: bytes still open after this many tokens are no character.
_PATIENCE = 12


class Decoder(Protocol):
    """Any tokenizer: byte-level BPE, or SentencePiece with byte fallback."""

    def decode(self, ids: list[int]) -> str: ...


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
        #: Last tokens; the first `_read` of them are `_read_text`, already passed on.
        self._window = list(prompt_token_ids[-_CONTEXT:])
        self._read = len(self._window)
        self._read_text = decoder.decode(self._window).rstrip(_OPEN) if self._window else ""
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
        rest = ""
        if self.stopped_by is None and len(self._window) > self._read:
            text = self._decoder.decode(self._window)
            rest = self._pass_on(text[len(self._read_text) :].rstrip(_OPEN))
        rest += self._held
        self._held = ""
        self._window.clear()
        self._read, self._read_text = 0, ""
        return rest

    def _decode(self) -> str:
        """New whole characters of the window."""
        text = self._decoder.decode(self._window)
        end = len(self._window)
        if text.endswith(_OPEN):
            if end - self._read < _PATIENCE:
                return ""
            end, text = self._whole_part(text)
        new = text[len(self._read_text) :]
        # What was just read stays as the context of the next token.
        self._window = self._window[self._read :]
        self._read = end - self._read
        self._read_text = self._decoder.decode(self._window[: self._read])
        return new

    def _whole_part(self, text: str) -> tuple[int, str]:
        """Longest part of the window, (tokens, text), that no further token can change.

        Where cutting the tokens cuts the text, no character runs across the cut.
        """
        for end in range(len(self._window) - 1, self._read, -1):
            head = self._decoder.decode(self._window[:end])
            if head + self._decoder.decode(self._window[end:]) == text:
                return end, head
        return len(self._window), text

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
