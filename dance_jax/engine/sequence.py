"""What a user asks for and gets back, and the state of one sample in between.

Names and defaults are vLLM's. Everything but `Sequence` crosses processes with msgspec.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import numbers
import sys
from typing import Any, Literal

import msgspec

from dance_jax.config import UserError

#: Most alternatives per token that `SamplingParams.logprobs` can ask for (compiled into the step).
MAX_LOGPROBS = 20
#: Most token ids (EOS included) that `SamplingParams.min_tokens` can hold back (compiled too).
MAX_STOP_IDS = 16
#: Most tokens, prompt or output, that anything here counts to: numbers go to the device as int32.
MAX_TOKENS = 2**31 - 1
#: Most samples of one prompt.
MAX_SAMPLES = 1024
#: Most entries of `SamplingParams.logit_bias` (compiled into the step).
MAX_LOGIT_BIAS = 300
#: Temperatures below this are greedy, as in vLLM.
GREEDY_TEMPERATURE = 1e-5

FinishReason = Literal["stop", "length", "error", "abort"]


class SamplingParams(msgspec.Struct, kw_only=True):
    """How to sample; defaults are vLLM's.

    Raises:
        UserError: a field has a wrong type or value; the message names the field.
    """

    #: Samples of each prompt.
    n: int = 1
    #: 0 is greedy.
    temperature: float = 1.0
    #: Keep the fewest most likely tokens whose probabilities reach this sum, 0 < top_p <= 1.
    top_p: float = 1.0
    #: Keep the most likely tokens; 0 or -1 keeps all.
    top_k: int = 0
    #: Keep tokens at least this times as likely as the most likely one, 0..1.
    min_p: float = 0.0
    #: Same seed, same output; None takes seeds from the engine's own.
    seed: int | None = None
    #: Strings that end the text; they are not part of it.
    stop: str | list[str] | None = None
    #: Tokens that end the output, beside the model's EOS; they are not part of the text.
    stop_token_ids: list[int] | None = None
    #: Most output tokens; None: as many as the context holds.
    max_tokens: int | None = 16
    #: Output tokens before EOS, stop_token_ids or stop strings may end it.
    min_tokens: int = 0
    #: Go on after the model's EOS.
    ignore_eos: bool = False
    #: Most likely alternatives reported for each output token (beside the token itself).
    logprobs: int | None = None
    #: Above 1 makes tokens of the prompt and the output less likely, below 1 more.
    repetition_penalty: float = 1.0
    #: Subtracted from the logit of every token that is in the output, -2..2.
    presence_penalty: float = 0.0
    #: Subtracted from a token's logit for each time it is in the output, -2..2.
    frequency_penalty: float = 0.0
    #: Token id -> what is added to its logit, -100..100; at most MAX_LOGIT_BIAS tokens.
    logit_bias: dict[int, float] | None = None

    def __post_init__(self) -> None:
        if self.stop is None:
            self.stop = []
        elif isinstance(self.stop, str):
            self.stop = [self.stop]
        if self.stop_token_ids is None:
            self.stop_token_ids = []
        if self.seed == -1:
            self.seed = None
        self.verify()
        # numpy's numbers, say: only Python's own cross processes.
        for name in ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs"):
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

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        if isinstance(self.stop, str):
            return [self.stop]
        return self.stop or []

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    def verify(self) -> None:
        """Check every field.

        Raises:
            UserError: a field has a wrong type or value; the message names the field.
        """
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
            _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _reject("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")
        if self.min_tokens and len(self.stop_token_ids or []) >= MAX_STOP_IDS:
            count = len(self.stop_token_ids or [])
            limit = f"at most {MAX_STOP_IDS - 1} ids together with min_tokens"
            _reject("stop_token_ids", f"{count} ids", limit)
        if not isinstance(self.ignore_eos, bool):
            _reject("ignore_eos", self.ignore_eos, "True or False")
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _number("repetition_penalty", self.repetition_penalty, 1e-6, 1e6)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_bias(self.logit_bias)
        if self.greedy and self.n > 1:
            _reject("n", self.n, "1 when temperature is 0: greedy samples are all the same")


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
    # Compared as it is: an integer can be larger than any float.
    if not real or not low <= value <= min(high, sys.float_info.max):  # pyright: ignore
        span = f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        _reject(field, value, f"a finite number {span}")


def _items(field: str, value: Any, expected: str) -> list | tuple:
    if not isinstance(value, list | tuple):
        _reject(field, value, expected)
    return value


class Logprob(msgspec.Struct):
    """One token at one place of the output, under the model's own distribution.

    The distribution is that of the unchanged logits: before temperature, penalties and masks.
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
    #: For each output token: token id -> Logprob, of the token and of the most likely ones;
    #: None when not asked for.
    logprobs: list[dict[int, Logprob]] | None = None
    #: None while it runs.
    finish_reason: FinishReason | None = None
    #: The stop string or token id that ended it (None for EOS); for "error" the reason as text.
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestMetrics(msgspec.Struct):
    """Times in seconds; the absolute ones are unix time. None: it did not happen (yet)."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    #: A step began to compute the prompt.
    first_scheduled_time: float | None = None

    @property
    def ttft_s(self) -> float | None:
        """From arrival to the first output token (of any sample)."""
        if self.first_token_time is None:
            return None
        return self.first_token_time - self.arrival_time

    @property
    def e2e_s(self) -> float | None:
        """From arrival to the end of the last sample."""
        return None if self.finished_time is None else self.finished_time - self.arrival_time


class RequestOutput(msgspec.Struct):
    """A prompt with its samples."""

    request_id: str
    #: None when the prompt came as token ids.
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics


class OutputDelta(msgspec.Struct):
    """What one step added to one sample: the engine's unit of streaming.

    `engine.output.OutputCollector` adds deltas up to a RequestOutput.
    """

    request_id: str
    index: int
    #: New text; may lag behind token_ids (open characters, possible stop strings).
    text: str = ""
    token_ids: list[int] = []
    #: Sum of the logprobs of token_ids.
    logprob: float = 0.0
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    metrics: RequestMetrics | None = None


class Request(msgspec.Struct):
    """One prompt on its way to an engine."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    #: Unix time in seconds; None: the engine notes when it gets the request.
    arrival_time: float | None = None
    #: Per sample, output tokens that an engine before this one has brought: it goes on from there.
    #: Samples that had finished have None. Empty: all begin.
    resumed: list[list[int] | None] = []


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """State of one sample: what the scheduler moves and the runner computes.

    Invariant: tokens 0..num_computed-1 are in the KV cache of `device`, position p in block
    blocks[p // block_size].
    """

    request_id: str
    #: Which of the request's n samples.
    index: int
    prompt_token_ids: list[int]
    params: SamplingParams
    #: Most output tokens: params.max_tokens, cut to the context.
    max_tokens: int
    #: uint32; the sampling key is fold_in(key(seed), number of output tokens so far).
    seed: int
    #: Tokens that end the output: EOS (unless ignored) and params.stop_token_ids.
    stop_ids: frozenset[int] = frozenset()
    #: Tokens that cannot be sampled before params.min_tokens outputs, at most MAX_STOP_IDS.
    held_back_ids: tuple[int, ...] = ()
    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0
    #: -1: it waits.
    device: int = -1
    blocks: list[int] = dataclasses.field(default_factory=list)
    #: Where its recurrent states are on the device, and where the next step leaves them, from 1 on;
    #: 0: it waits.
    state_slots: tuple[int, int] = (0, 0)
    #: Number in the order in which the scheduler got the sequences.
    arrival: int = -1
    #: time.monotonic() before which it rests, as experts that it needs were not to be had; 0: its
    #: last step brought it on.
    rests_until: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Known tokens, prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_pending(self) -> int:
        """Known tokens that are not in the KV cache."""
        return self.num_tokens - self.num_computed

    @property
    def prefilling(self) -> bool:
        """More is pending than the one token that a decode step takes, or it is a prompt token."""
        return self.num_pending > 1 or self.num_computed < len(self.prompt_token_ids)

    def tokens(self, start: int, count: int) -> list[int]:
        """Known tokens start..start+count-1 (fewer at the end)."""
        border = len(self.prompt_token_ids)
        if start >= border:
            return self.output_token_ids[start - border : start - border + count]
        found = self.prompt_token_ids[start : start + count]
        return found + self.output_token_ids[: count - len(found)]


def sample_seed(seed: int, index: int) -> int:
    """uint32 seed of sample `index` of a request with this seed; well mixed, machine-independent.

    Args:
        seed: any integer of up to 64 bits.
        index: number of the sample, 0..n-1.
    """
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
