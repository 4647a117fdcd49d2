"""Conversion of requests to sequences, and of sampled tokens to deltas."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterable

import numpy as np

from dance_jax.engine.allowed import Allowed, words_of
from dance_jax.engine.detokenizer import Decoder, Detokenizer
from dance_jax.engine.sequence import (
    FinishReason,
    Logprob,
    OutputDelta,
    Request,
    RequestMetrics,
    SamplingParams,
    Sequence,
    request_seeds,
    sample_seed,
)
from dance_jax.engine.structured import Structure, Structures


@dataclasses.dataclass(slots=True)
class _Open:
    """A request with unfinished samples."""

    metrics: RequestMetrics
    detokenizers: dict[int, Detokenizer]


class RequestTracker:
    """The samples in flight in one engine.

    Args:
        decoder: the tokenizer.
        max_model_len: context length in tokens, prompt plus output.
        vocab_size: upper bound of token ids, exclusive.
        eos_token_ids: the model's EOS tokens.
        seed: base of the seeds of requests without one, assigned in order of arrival.
        rank: the server's rank, so that servers draw differently from the same seed.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        self._decoder = decoder
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._eos = tuple(eos_token_ids)
        self._seeds = request_seeds(seed, rank)
        self._structures = Structures(decoder, vocab_size, self._eos)
        self._open: dict[str, _Open] = {}

    def open(self, request: Request) -> tuple[list[Sequence], list[OutputDelta]]:
        """Sequences to schedule, or, for an invalid request, deltas with the reason."""
        metrics = RequestMetrics(request.arrival_time)
        reason = self._refusal(request)
        if reason is not None:
            metrics.finished_time = time.time()
            return [], [
                OutputDelta(
                    request.request_id,
                    index,
                    finish_reason="error",
                    stop_reason=reason,
                    metrics=metrics,
                )
                for index in range(request.params.n)
            ]
        params = request.params
        room = self._max_model_len - len(request.prompt_token_ids)
        ends = self._ends(params)
        bad_words = self._bad_words(params)
        stop_ids = frozenset((params.stop_token_ids or ()) if params.ignore_eos else ends)
        seed = next(self._seeds) if params.seed is None else params.seed
        sequences = [
            Sequence(
                request_id=request.request_id,
                index=index,
                prompt_token_ids=request.prompt_token_ids,
                params=params,
                max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                seed=sample_seed(seed, index),
                stop_ids=stop_ids,
                allowed=self._allowed(params, ends, bad_words, resumed),
                # Given out with the first token of the first sample.
                prompt_logprobs=None if params.prompt_logprobs is None or index or resumed else {},
                output_token_ids=list(resumed),
                client=request.client,
            )
            for index, resumed in enumerate(request.resumed or [[]] * params.n)
            if resumed is not None
        ]
        self._open[request.request_id] = _Open(
            metrics, {sequence.index: self._detokenizer(sequence) for sequence in sequences}
        )
        return sequences, []

    def _allowed(
        self,
        params: SamplingParams,
        ends: tuple[int, ...],
        bad_words: list[list[int]],
        output: list[int],
    ) -> Allowed | None:
        """The tokens that a sample may have after its output so far; None for all."""
        only, structured = params.allowed_token_ids, params.structured_outputs
        if not (only or bad_words or params.min_tokens or structured):
            return None
        structure = None
        if structured is not None:
            special = self._special_w
            if structured.unless_begins_with is not None:
                special = np.zeros_like(special)  # calls have special tokens
            structure = Structure(
                self._structures.matcher(structured),
                structured.begins_after,
                self._piece,
                self._ends_w,
                special,
                output,
            )
        # As in vLLM, EOS is held back even if it is ignored.
        return Allowed(self._vocab_size, only or (), bad_words, ends, params.min_tokens, structure)

    @functools.cached_property
    def _ends_w(self) -> np.ndarray:
        """Bits of the EOS tokens."""
        return words_of(self._eos, self._vocab_size)

    @functools.cached_property
    def _special_w(self) -> np.ndarray:
        """Bits of the special tokens."""
        special = [token for token in self._decoder.special_ids() if token < self._vocab_size]
        return words_of({*special, *self._eos}, self._vocab_size)

    def _piece(self, token: int) -> str:
        return self._decoder.decode([token], skip_special_tokens=False)

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """The runs of tokens that bad_words exclude, as in vLLM."""
        runs = []
        for word in params.bad_words or ():
            plain = self._decoder.encode(word, add_special_tokens=False)
            spaced = self._decoder.encode(f" {word.lstrip()}", add_special_tokens=False)
            runs += [run for run in (plain, spaced) if run and run not in runs]
        return runs

    def _detokenizer(self, sequence: Sequence) -> Detokenizer:
        """A detokenizer for a sample, advanced past the output tokens that the sample has."""
        params = sequence.params
        detokenizer = Detokenizer(
            self._decoder,
            sequence.prompt_token_ids,
            params.stop_strings,
            params.min_tokens,
            params.include_stop_str_in_output,
            params.skip_special_tokens,
        )
        for token in sequence.output_token_ids:
            detokenizer.append(token)
        return detokenizer

    def scheduled(self, sequence: Sequence) -> None:
        """Note that a step is about to compute the sequence's prompt, or a part of it."""
        metrics = self._open[sequence.request_id].metrics
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time = time.time()

    def append(
        self,
        sequence: Sequence,
        token: int,
        logprob: float,
        rank: int = 0,
        top: Iterable[tuple[int, float]] = (),
    ) -> OutputDelta:
        """Add a sampled token to its sequence; the delta's finish_reason is set on the last one.

        Args:
            sequence: of a request that was opened.
            token: the token id.
            logprob: of the token.
            rank: of the token, 1 for the most likely one.
            top: (token id, logprob) of the most likely tokens, the most likely one first.
        """
        opened = self._open[sequence.request_id]
        now = time.time()
        first = opened.metrics.first_token_time is None
        if first:
            opened.metrics.first_token_time = now
        params = sequence.params
        delta = OutputDelta(
            sequence.request_id,
            sequence.index,
            prompt_logprobs=self._prompt_logprobs(sequence),
            metrics=opened.metrics if first else None,
        )
        if not sequence.max_tokens:
            delta.finish_reason = "length"
            self._close(sequence, opened, delta, now)
            return delta
        sequence.output_token_ids.append(token)
        delta.token_ids, delta.logprob = [token], logprob
        if params.logprobs is not None:
            delta.logprobs = [self.logprobs(token, logprob, rank, top, params.logprobs)]
        if sequence.structure is not None:
            sequence.structure.append(token)
        count = len(sequence.output_token_ids)
        detokenizer = opened.detokenizers[sequence.index]
        if count >= params.min_tokens and token in sequence.stop_ids:
            if params.include_stop_str_in_output:
                delta.text = detokenizer.append(token)
            delta.finish_reason = "stop"
            is_eos = token in self._eos and not params.ignore_eos
            delta.stop_reason = None if is_eos else token
        else:
            delta.text = detokenizer.append(token)
            if sequence.complete:
                delta.finish_reason = "stop"
            elif detokenizer.stopped_by is None and count >= sequence.max_tokens:
                delta.finish_reason = "length"
        if delta.finish_reason is not None:
            delta.text += detokenizer.finish()
        if detokenizer.stopped_by is not None:
            delta.finish_reason, delta.stop_reason = "stop", detokenizer.stopped_by
        if delta.finish_reason is not None:
            self._close(sequence, opened, delta, now)
        return delta

    def logprobs(
        self, token: int, logprob: float, rank: int, top: Iterable[tuple[int, float]], most: int
    ) -> dict[int, Logprob]:
        """Token id -> Logprob, for a token and for the most likely ones.

        Args:
            token: the token id.
            logprob: of the token.
            rank: of the token.
            top: as in `append`.
            most: maximum number of most likely tokens.
        """
        found = {token: (logprob, rank)}
        for place, (other, each) in enumerate(itertools.islice(top, most), 1):
            found.setdefault(other, (each, place))
        return {each: Logprob(*what, self._decoder.decode([each])) for each, what in found.items()}

    @staticmethod
    def _prompt_logprobs(sequence: Sequence) -> list[dict[int, Logprob] | None] | None:
        """The logprobs of the prompt's tokens, which are given out once; None if not wanted."""
        found, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        if found is None:
            return None
        return [found.get(position) for position in range(len(sequence.prompt_token_ids))]

    def end(self, sequence: Sequence, reason: FinishReason, why: str | None = None) -> OutputDelta:
        """End a sample early ("abort", "error"); the delta has the text held back so far."""
        opened = self._open[sequence.request_id]
        delta = OutputDelta(
            sequence.request_id,
            sequence.index,
            text=opened.detokenizers[sequence.index].finish(),
            finish_reason=reason,
            stop_reason=why,
        )
        self._close(sequence, opened, delta, time.time())
        return delta

    def _close(self, sequence: Sequence, opened: _Open, delta: OutputDelta, now: float) -> None:
        del opened.detokenizers[sequence.index]
        if not opened.detokenizers:
            opened.metrics.finished_time = now
            del self._open[sequence.request_id]
        delta.metrics = opened.metrics

    def _refusal(self, request: Request) -> str | None:
        """The reason why this model cannot run the request; None if it can.

        `SamplingParams` has checked its fields.
        """
        prompt = request.prompt_token_ids
        if not prompt:
            return "the prompt is empty: it must have at least one token"
        if len(prompt) + 1 > self._max_model_len:
            return (
                f"the prompt has {len(prompt)} tokens, which leaves no room for an output token in "
                f"the context of {self._max_model_len} tokens (max_model_len)"
            )
        invalid = [token for token in prompt if not 0 <= token < self._vocab_size]
        if invalid:
            return f"the prompt has token id {invalid[0]}; valid ids are 0..{self._vocab_size - 1}"
        unknown = [id for id in request.params.stop_token_ids or [] if id >= self._vocab_size]
        if unknown:
            return f"stop_token_ids has {unknown[0]}; valid ids are 0..{self._vocab_size - 1}"
        for name in ("logit_bias", "allowed_token_ids"):
            highest = max(getattr(request.params, name) or (), default=0)
            if highest >= self._vocab_size:
                return f"{name} has token id {highest}; valid ids are 0..{self._vocab_size - 1}"
        if request.request_id in self._open:
            return f"request id {request.request_id!r} is already in use"
        return None

    def _ends(self, params: SamplingParams) -> tuple[int, ...]:
        """The model's EOS tokens and stop_token_ids, each once."""
        return tuple(dict.fromkeys((*self._eos, *(params.stop_token_ids or ()))))
