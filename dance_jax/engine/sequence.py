"""Requests, sampling parameters and outputs, and the state of one sample.

Names and defaults are vLLM's. All types but `Sequence` cross processes with msgspec.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import numbers
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from dance_jax.config import UserError
from dance_jax.engine.structured import Structure, StructuredOutputsParams

if TYPE_CHECKING:
    from dance_jax.engine.allowed import Allowed

#: Maximum of `SamplingParams.logprobs`, alternatives per token (compiled into the step).
MAX_LOGPROBS = 20
#: Maximum token count and token id: numbers go to the device as int32.
MAX_TOKENS = 2**31 - 1
#: Maximum number of samples of one prompt.
MAX_SAMPLES = 1024
#: Maximum number of entries of `SamplingParams.logit_bias` (compiled into the step).
MAX_LOGIT_BIAS = 300
#: Temperatures below this are greedy, as in vLLM.
GREEDY_TEMPERATURE = 1e-5

FinishReason = Literal["stop", "length", "error", "abort"]


class SamplingParams(msgspec.Struct, kw_only=True):
    """Sampling parameters; defaults are vLLM's.

    Raises:
        UserError: a field has a wrong type or value; the message names the field.
    """

    #: Number of samples of each prompt.
    n: int = 1
    #: 0 is greedy.
    temperature: float = 1.0
    #: Keep the fewest most likely tokens whose probabilities reach this sum, 0 < top_p <= 1.
    top_p: float = 1.0
    #: Keep this many most likely tokens; 0 or -1 keeps all.
    top_k: int = 0
    #: Keep tokens at least this times as likely as the most likely one, 0..1.
    min_p: float = 0.0
    #: Equal seeds give equal outputs; None to take a seed from the engine.
    seed: int | None = None
    #: Strings that end the text; they are not part of it.
    stop: str | list[str] | None = None
    #: Tokens that end the output, in addition to the model's EOS; they are not part of the text.
    stop_token_ids: list[int] | None = None
    #: Whether a stop string or stop token that ends the text is part of it.
    include_stop_str_in_output: bool = False
    #: Maximum number of output tokens; None for as many as fit the context, 0 to compute the prompt
    #: only.
    max_tokens: int | None = 16
    #: Output tokens required before EOS, stop_token_ids or stop strings can end the output.
    min_tokens: int = 0
    #: Continue after the model's EOS.
    ignore_eos: bool = False
    #: Most likely alternatives reported per output token, in addition to the token itself.
    logprobs: int | None = None
    #: The same for the prompt's tokens, from the second on.
    prompt_logprobs: int | None = None
    #: Whether special tokens are left out of the text.
    skip_special_tokens: bool = True
    #: Use only this many of the prompt's last tokens; -1 for as many as leave room for max_tokens.
    truncate_prompt_tokens: int | None = None
    #: Above 1, makes tokens of the prompt and the output less likely; below 1, more likely.
    repetition_penalty: float = 1.0
    #: Subtracted from the logit of every token that is in the output, -2..2.
    presence_penalty: float = 0.0
    #: Subtracted from a token's logit once for each time the token is in the output, -2..2.
    frequency_penalty: float = 0.0
    #: Token id -> bias added to its logit, -100..100; at most MAX_LOGIT_BIAS tokens.
    logit_bias: dict[int, float] | None = None
    #: Texts that must not occur in the output; each as the tokenizer encodes it, with and without a
    #: space before it.
    bad_words: list[str] | None = None
    #: The only tokens that may be in the output; None for all.
    allowed_token_ids: list[int] | None = None
    #: What the output must be; None for anything.
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        if self.stop is None:
            self.stop = []
        elif isinstance(self.stop, str):
            self.stop = [self.stop]
        if self.stop_token_ids is None:
            self.stop_token_ids = []
        if self.seed == -1:
            self.seed = None
        self._verify()
        # Convert e.g. numpy's numbers: only Python's own types cross processes.
        for name in (
            "n",
            "top_k",
            "seed",
            "max_tokens",
            "min_tokens",
            "logprobs",
            "prompt_logprobs",
            "truncate_prompt_tokens",
        ):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, int(value))
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            setattr(self, name, float(getattr(self, name)))
        self.logit_bias = {
            int(token): float(bias) for token, bias in (self.logit_bias or {}).items()
        }
        self.stop_token_ids = [int(token) for token in self.stop_token_ids]
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = [int(token) for token in self.allowed_token_ids]

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        if isinstance(self.stop, str):
            return [self.stop]
        return self.stop or []

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    def truncated(self, prompt: list[int], max_model_len: int) -> list[int]:
        """The end of a prompt that `truncate_prompt_tokens` asks for."""
        most = self.truncate_prompt_tokens
        if most == -1:
            output = 1 if self.max_tokens is None else max(self.max_tokens, 1)
            most = max(max_model_len - output, 1)
        return prompt if most is None else prompt[-most:]

    def _verify(self) -> None:
        _integer("n", self.n, 1, MAX_SAMPLES)
        _number("temperature", self.temperature, 0.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            _reject("top_p", self.top_p, "above 0 and at most 1")
        _integer("top_k", self.top_k, -1, MAX_TOKENS)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        for text in _items("stop", self.stop_strings, "a string or a list of strings"):
            if not isinstance(text, str) or not text:
                _reject("stop", text, "a non-empty string, or a list of them")
        for token in _items("stop_token_ids", self.stop_token_ids or [], "a list of token ids"):
            _integer("stop_token_ids", token, 0, MAX_TOKENS)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0, MAX_TOKENS)
        _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _reject("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                _reject(name, getattr(self, name), "True or False")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.truncate_prompt_tokens is not None:
            _integer("truncate_prompt_tokens", self.truncate_prompt_tokens, -1, MAX_TOKENS)
            if self.truncate_prompt_tokens == 0:
                _reject("truncate_prompt_tokens", 0, "at least 1, or -1")
        self._verify_words()
        _number("repetition_penalty", self.repetition_penalty, 1e-6, 1e6)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_bias(self.logit_bias)
        if self.greedy and self.n > 1:
            _reject("n", self.n, "1 if temperature is 0, because greedy samples are all the same")

    def _verify_words(self) -> None:
        for word in _items("bad_words", self.bad_words or [], "a list of texts"):
            if not isinstance(word, str) or not word.strip():
                _reject("bad_words", word, "a list of texts that are not empty")
        if self.allowed_token_ids is not None:
            for token in _items("allowed_token_ids", self.allowed_token_ids, "a list of token ids"):
                _integer("allowed_token_ids", token, 0, MAX_TOKENS)
            if not self.allowed_token_ids:
                _reject("allowed_token_ids", [], "None or a list with at least one token id")
        wanted = self.structured_outputs
        if not isinstance(wanted, StructuredOutputsParams | None):
            _reject("structured_outputs", wanted, "a StructuredOutputsParams")


def _check_bias(bias: Any) -> None:
    if bias is None:
        return
    if not isinstance(bias, dict):
        _reject("logit_bias", bias, "a mapping of token ids to numbers")
    if len(bias) > MAX_LOGIT_BIAS:
        _reject("logit_bias", f"{len(bias)} entries", f"at most {MAX_LOGIT_BIAS} entries")
    for token, value in bias.items():
        _integer("logit_bias", token, 0, MAX_TOKENS)
        _number("logit_bias", value, -100.0, 100.0)


def _reject(field: str, value: object, expected: str) -> None:
    raise UserError(f"SamplingParams.{field}: must be {expected}; got {value!r}")


def _integer(field: str, value: Any, low: int, high: int | None = None) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or int(value) < low or (high is not None and int(value) > high):
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        _reject(field, value, f"an integer {span}")


def _number(field: str, value: Any, low: float, high: float = math.inf) -> None:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    # Compared without conversion: an integer can be larger than any float.
    if not real or not low <= value <= min(high, sys.float_info.max):  # pyright: ignore
        span = f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        _reject(field, value, f"a finite number {span}")


def _items(field: str, value: Any, expected: str) -> list | tuple:
    if not isinstance(value, list | tuple):
        _reject(field, value, expected)
    return value


class Logprob(msgspec.Struct):
    """The log-probability of one token at one position of the output.

    The distribution is that of the unchanged logits, before temperature, penalties and masks.
    """

    #: Natural logarithm of the probability.
    logprob: float
    #: 1 for the most likely token.
    rank: int | None = None
    decoded_token: str | None = None


class CompletionOutput(msgspec.Struct):
    """One sample of one prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    #: Sum of the output tokens' logprobs.
    cumulative_logprob: float = 0.0
    #: For each output token: token id -> Logprob, for the token and for the most likely ones; None
    #: if not requested.
    logprobs: list[dict[int, Logprob]] | None = None
    #: None while the sample runs.
    finish_reason: FinishReason | None = None
    #: The stop string or token id that ended the sample (None for EOS); for "error", the reason.
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestMetrics(msgspec.Struct):
    """Times in seconds; absolute ones are unix time. None for events that have not happened."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    #: When the first step began to compute the prompt.
    first_scheduled_time: float | None = None

    @property
    def ttft_s(self) -> float | None:
        """Seconds from arrival to the first output token of any sample."""
        if self.first_token_time is None:
            return None
        return self.first_token_time - self.arrival_time

    @property
    def e2e_s(self) -> float | None:
        """Seconds from arrival to the end of the last sample."""
        return None if self.finished_time is None else self.finished_time - self.arrival_time


class OutputDelta(msgspec.Struct):
    """The addition of one step to one sample, the engine's unit of streaming."""

    request_id: str
    index: int
    #: New text; may lag behind token_ids (incomplete characters, possible stop strings).
    text: str = ""
    token_ids: list[int] = []
    #: Sum of the logprobs of token_ids.
    logprob: float = 0.0
    logprobs: list[dict[int, Logprob]] | None = None
    #: In the first delta of sample 0 if requested: for each token of the prompt, token id ->
    #: Logprob as in `CompletionOutput`; None for the first token.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    metrics: RequestMetrics | None = None


class Request(msgspec.Struct):
    """A request: one prompt with its sampling parameters."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    #: Unix time in seconds.
    arrival_time: float = msgspec.field(default_factory=time.time)
    #: Who sent the request; waiting requests are admitted round robin between clients.
    client: str = ""
    #: Per sample, output tokens from an earlier engine, from which this one continues; None for a
    #: finished sample. Empty if all samples start from the beginning.
    resumed: list[list[int] | None] = []


class RequestOutput(msgspec.Struct):
    """A prompt with its samples."""

    request_id: str
    #: None if the prompt was given as token ids.
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    #: As in `OutputDelta`; None if not requested.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @staticmethod
    def of(request: Request) -> RequestOutput:
        """The output of a request before its first delta."""
        logprobs = request.params.logprobs is not None
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            [
                CompletionOutput(index, logprobs=[] if logprobs else None)
                for index in range(request.params.n)
            ],
            finished=False,
            metrics=RequestMetrics(request.arrival_time),
        )

    def add(self, delta: OutputDelta) -> None:
        """Add a delta of this request."""
        sample = self.outputs[delta.index]
        sample.text += delta.text
        sample.token_ids.extend(delta.token_ids)
        sample.cumulative_logprob += delta.logprob
        if sample.logprobs is not None and delta.logprobs is not None:
            sample.logprobs.extend(delta.logprobs)
        if delta.finish_reason is not None:
            sample.finish_reason, sample.stop_reason = delta.finish_reason, delta.stop_reason
            self.finished = all(sample.finished for sample in self.outputs)
        if delta.metrics is not None:
            self.metrics = delta.metrics
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """State of one sample, which the scheduler plans and the runner computes.

    Invariant: tokens 0..num_computed-1 are in the KV cache of `device`, position p in block
    blocks[p // block_size].
    """

    request_id: str
    #: Index among the request's n samples.
    index: int
    prompt_token_ids: list[int]
    params: SamplingParams
    #: Maximum number of output tokens: params.max_tokens, cut to the context.
    max_tokens: int
    #: uint32; the sampling key is fold_in(key(seed), number of output tokens so far).
    seed: int
    #: Tokens that end the output: EOS (unless ignored) and params.stop_token_ids.
    stop_ids: frozenset[int] = frozenset()
    #: The tokens that may be sampled; None for all.
    allowed: Allowed | None = None
    #: Logprobs of the prompt's tokens by position, until they are given out; None if not requested.
    prompt_logprobs: dict[int, dict[int, Logprob]] | None = None
    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0
    #: Device that runs the sequence; -1 while it waits.
    device: int = -1
    blocks: list[int] = dataclasses.field(default_factory=list)
    #: Slots, from 1 on, from which the next step reads the recurrent states and to which it writes
    #: them; 0 while the sequence waits.
    state_slots: tuple[int, int] = (0, 0)
    #: `Request.client`.
    client: str = ""
    #: Order of arrival at the scheduler.
    arrival: int = -1
    #: Order of the first admission, or of arrival if an earlier engine admitted the sequence; -1
    #: before. A lower turn goes first ever after.
    turn: int = -1
    #: time.monotonic() until which the sequence pauses because experts were unavailable; 0 if its
    #: last step succeeded.
    rests_until: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Number of known tokens, prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_pending(self) -> int:
        """Number of known tokens that are not in the KV cache."""
        return self.num_tokens - self.num_computed

    @property
    def structure(self) -> Structure | None:
        """The structure of the output, if it has one."""
        return None if self.allowed is None else self.allowed.structure

    @property
    def ready(self) -> bool:
        """Whether the structure of the output is prepared."""
        return self.structure is None or self.structure.ready

    @property
    def complete(self) -> bool:
        """Whether the structure of the output allows nothing more."""
        return self.structure is not None and self.structure.ended

    @property
    def error(self) -> str | None:
        """Why the output cannot have its structure; None if it can."""
        return None if self.structure is None else self.structure.error

    @property
    def prefilling(self) -> bool:
        """Whether more than one token is pending, or a prompt token; otherwise it decodes."""
        return self.num_pending > 1 or self.num_computed < len(self.prompt_token_ids)

    def tokens(self, start: int, count: int) -> list[int]:
        """Known tokens start..start+count-1, or fewer at the end."""
        border = len(self.prompt_token_ids)
        if start >= border:
            return self.output_token_ids[start - border : start - border + count]
        found = self.prompt_token_ids[start : start + count]
        return found + self.output_token_ids[: count - len(found)]


def sample_seed(seed: int, index: int) -> int:
    """A well-mixed uint32 seed for one sample of a request; the same on all machines.

    Args:
        seed: the request's seed, any integer of up to 64 bits.
        index: number of the sample, 0..n-1.
    """
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def request_seeds(seed: int, rank: int = 0) -> Iterator[int]:
    """Seeds for the requests that a server gets without one, in order of arrival.

    Args:
        seed: of the launch.
        rank: of the server; servers draw differently from the same seed.
    """
    return (sample_seed(seed, number) for number in itertools.count(rank << 32))
