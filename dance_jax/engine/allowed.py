"""Which tokens may be sampled next: masks, made on the host while the layers of a step run.

Axis letters: r rows, w words of 32 bits, one bit per token of the vocabulary.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dance_jax.engine import sequence
    from dance_jax.engine.structured import Structure


def num_words(vocab_size: int) -> int:
    """w: words for one bit per token."""
    return -(-vocab_size // 32)


class Allowed:
    """The tokens that one sample may have next.

    A restriction that would leave no token at all is not applied: first the structure counts, then
    the tokens that are always allowed, then those that are not allowed now.

    Args:
        vocab_size: upper bound of token ids, exclusive.
        only: the tokens allowed at all; empty: all.
        never: runs of tokens that must not occur.
        ends: tokens that must not be sampled yet.
        until: number of output tokens from which on they may.
        structure: what the output must be; None if it is free.
    """

    def __init__(
        self,
        vocab_size: int,
        only: Iterable[int] = (),
        never: Iterable[Sequence[int]] = (),
        ends: Iterable[int] = (),
        until: int = 0,
        structure: Structure | None = None,
    ) -> None:
        self._all = _all_words(vocab_size)
        only, never = [*only], [tuple(run) for run in never]
        self._always = words_of(only, vocab_size) if only else self._all.copy()
        singles = [run[0] for run in never if len(run) == 1]
        _narrow(self._always, ~words_of(singles, vocab_size))
        self._runs = [run for run in never if len(run) > 1]
        self._restricts = bool(only or never)
        self._ends, self._until = [*ends], until
        self.structure = structure

    def restricts(self, count: int) -> bool:
        """Whether any token is not allowed after `count` output tokens."""
        structured = self.structure is not None and self.structure.restricts
        return structured or self._restricts or (count < self._until and bool(self._ends))

    def fill(self, words_w: np.ndarray, output: Sequence[int]) -> None:
        """Write the tokens that may follow the output.

        Args:
            words_w: int32.
            output: the output tokens so far.
        """
        if self.structure is not None and self.structure.restricts:
            words_w[:] = 0
            self.structure.fill(words_w)
            if self._restricts:
                _narrow(words_w, self._always)
        else:
            words_w[:] = self._always
        now = [run[-1] for run in self._runs if tuple(output[1 - len(run) :]) == run[:-1]]
        if len(output) < self._until:
            now += self._ends
        if now:
            _narrow(words_w, ~words_of(now, 32 * len(words_w)))


def words_of(tokens: Iterable[int], vocab_size: int) -> np.ndarray:
    """int32 [w] with the bits of some tokens set."""
    bits = np.zeros(32 * num_words(vocab_size), np.uint8)
    bits[[*tokens]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


@functools.lru_cache(maxsize=4)
def _all_words(vocab_size: int) -> np.ndarray:
    bits = np.zeros(32 * num_words(vocab_size), np.uint8)
    bits[:vocab_size] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _narrow(words_w: np.ndarray, allowed_w: np.ndarray) -> None:
    kept_w = words_w & allowed_w
    if kept_w.any():
        words_w[:] = kept_w


class Masks:
    """Makes the masks of steps.

    This happens on the stepping thread, while the devices compute the layers: to hand the work to
    another thread costs more than the work (measured: 5 % of a step, of which 3 % are masks).

    Args:
        vocab_size: upper bound of token ids, exclusive.
    """

    def __init__(self, vocab_size: int) -> None:
        self._width = num_words(vocab_size)
        #: Masks made since the start, and the seconds that this took.
        self.count, self.seconds = 0, 0.0

    def none(self, rows: int) -> np.ndarray:
        """int32 [r, w]: all tokens are allowed."""
        return np.full((rows, self._width), -1, np.int32)

    def make(
        self, sampled: Sequence[Mapping[int, sequence.Sequence]], rows: int
    ) -> list[np.ndarray] | None:
        """The masks of each device, int32 [r, w]; None if all tokens are allowed in all rows.

        Args:
            sampled: of each device, row -> sequence sampled in that row.
            rows: number of rows of each device.
        """
        restricted = [
            {row: one for row, one in device.items() if restricts(one)} for device in sampled
        ]
        if not any(restricted):
            return None
        began = time.perf_counter()
        masks = []
        for device in restricted:
            words_rw = self.none(rows)
            for row, one in device.items():
                assert one.allowed is not None
                one.allowed.fill(words_rw[row], one.output_token_ids)
            self.count += len(device)
            masks.append(words_rw)
        self.seconds += time.perf_counter() - began
        return masks


def restricts(one: sequence.Sequence) -> bool:
    """Whether any token is not allowed next in a sequence."""
    return one.allowed is not None and one.allowed.restricts(len(one.output_token_ids))
