"""Sampling on the device, for all rows at once, each with its own parameters and random key.

Semantics and order are vLLM's: masks, biases and penalties first; then argmax for greedy rows, and
temperature, min-p, top-k, top-p and a draw for the others. Reported logprobs are those of
the unchanged logits. Nothing is sorted: top-k and top-p keep every token at or above a threshold,
which is found by bisection over the bits of the logits (ties at the threshold are kept).

Axis letters: r rows, v vocabulary, w words of 32 tokens, h known tokens of a row, b biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from dance_jax.engine.sequence import MAX_LOGIT_BIAS, MAX_LOGPROBS, Sequence

#: Vocabulary entries per block of the draw's second stage.
_BLOCK = 256


class SamplingState(NamedTuple):
    """Sampling parameters of each row, made by `sampling_state`; unused rows are greedy."""

    #: float32 [r]; 0 is greedy.
    temperature: jax.Array
    #: float32 [r], in (0, 1]; 1 keeps all.
    top_p: jax.Array
    #: int32 [r]; 0 keeps all.
    top_k: jax.Array
    #: float32 [r]; 0 keeps all.
    min_p: jax.Array
    #: uint32 [r].
    seed: jax.Array
    #: int32 [r]: output tokens so far; the key is fold_in(key(seed), position).
    position: jax.Array
    #: bool [r]: whether to report the most likely tokens.
    top: jax.Array


class Adjustments(NamedTuple):
    """Changes of logits that few requests ask for; made by `adjustments`.

    The host sends them in every step with such a request, so they stay correct after prefix cache
    hits, preemption or an engine restart.
    """

    #: int32 [r, h]: known tokens, prompt and output, padded with -1.
    history: jax.Array
    #: int32 [r]: number of prompt tokens in the history.
    prompt_length: jax.Array
    #: float32 [r] each; the neutral values are 1, 0 and 0.
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    #: int32 [r, b], -1 for none, and float32 [r, b].
    bias_token: jax.Array
    bias: jax.Array


class Sampled(NamedTuple):
    """One token for each row."""

    #: int32 [r].
    token: jax.Array
    #: float32 [r]: natural logarithm of the token's probability under the unchanged logits.
    logprob: jax.Array
    #: int32 [r]: 1 + the number of more likely tokens; 0 if no row has `top`.
    rank: jax.Array
    #: int32 [r, k] and float32 [r, k]: the most likely tokens first; zeros if no row has `top`.
    top_token: jax.Array
    top_logprob: jax.Array


def sampling_state(sequences: Mapping[int, Sequence], rows: int) -> SamplingState:
    """The SamplingState of a step on one device, in numpy.

    Args:
        sequences: row -> sequence sampled in that row.
        rows: r, number of rows in the bucket.
    """
    array = {
        "temperature": np.zeros(rows, np.float32),
        "top_p": np.ones(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "min_p": np.zeros(rows, np.float32),
        "seed": np.zeros(rows, np.uint32),
        "position": np.zeros(rows, np.int32),
        "top": np.zeros(rows, bool),
    }
    for row, sequence in sequences.items():
        params = sequence.params
        array["temperature"][row] = 0 if params.greedy else params.temperature
        array["top_p"][row] = params.top_p
        array["top_k"][row] = min(max(params.top_k, 0), np.iinfo(np.int32).max)
        array["min_p"][row] = params.min_p
        array["seed"][row] = sequence.seed
        array["position"][row] = len(sequence.output_token_ids)
        array["top"][row] = params.logprobs is not None
    return SamplingState(**cast("dict[str, jax.Array]", array))


def adjusts(sequence: Sequence) -> bool:
    """Whether the sequence's parameters ask for `Adjustments`."""
    params = sequence.params
    penalised = params.repetition_penalty != 1 or params.presence_penalty
    return bool(penalised or params.frequency_penalty or params.logit_bias)


def adjustments(sequences: Mapping[int, Sequence], rows: int, longest: int) -> Adjustments:
    """The Adjustments of a step on one device, in numpy.

    Args:
        sequences: row -> sequence sampled in that row.
        rows: r, number of rows in the bucket.
        longest: h, maximum number of known tokens of a sequence.
    """
    array = {
        "history": np.full((rows, longest), -1, np.int32),
        "prompt_length": np.zeros(rows, np.int32),
        "repetition_penalty": np.ones(rows, np.float32),
        "presence_penalty": np.zeros(rows, np.float32),
        "frequency_penalty": np.zeros(rows, np.float32),
        "bias_token": np.full((rows, MAX_LOGIT_BIAS), -1, np.int32),
        "bias": np.zeros((rows, MAX_LOGIT_BIAS), np.float32),
    }
    for row, sequence in sequences.items():
        if not adjusts(sequence):
            continue
        params, biases = sequence.params, sequence.params.logit_bias or {}
        array["history"][row, : sequence.num_tokens] = sequence.tokens(0, sequence.num_tokens)
        array["prompt_length"][row] = len(sequence.prompt_token_ids)
        array["repetition_penalty"][row] = params.repetition_penalty
        array["presence_penalty"][row] = params.presence_penalty
        array["frequency_penalty"][row] = params.frequency_penalty
        array["bias_token"][row, : len(biases)] = list(biases)
        array["bias"][row, : len(biases)] = list(biases.values())
    return Adjustments(**cast("dict[str, jax.Array]", array))


@jax.named_scope("sampling")
def sample(
    logits_rv: jax.Array,
    state: SamplingState,
    changes: Adjustments,
    allowed_rw: jax.Array,
    top: int = MAX_LOGPROBS,
) -> Sampled:
    """Choose the next token of every row.

    A row's token depends only on the row's own logits, state and changes. Features that no row uses
    are not computed: greedy rows without changes cost one argmax and one log-sum-exp.

    Args:
        logits_rv: float32 [r, v], finite.
        state: parameters of each row.
        changes: changes of each row's logits.
        allowed_rw: int32 [r, w], one bit per token that may be chosen (`allowed.Masks`).
        top: number of most likely tokens to report (static).
    """
    changed_rv = jax.lax.cond(
        jnp.any(allowed_rw != -1), masked, lambda logits_rv, _: logits_rv, logits_rv, allowed_rw
    )
    changed_rv = jax.lax.cond(
        jnp.any(changes.history >= 0), adjusted, lambda logits_rv, _: logits_rv, changed_rv, changes
    )
    greedy_r = jnp.argmax(changed_rv, axis=-1).astype(jnp.int32)
    token_r = jax.lax.cond(
        jnp.any(state.temperature > 0),
        lambda logits_rv, greedy_r, state: jnp.where(
            state.temperature > 0, _draw(logits_rv, state), greedy_r
        ),
        lambda logits_rv, greedy_r, state: greedy_r,
        changed_rv,
        greedy_r,
        state,
    )
    chosen_r1 = jnp.take_along_axis(logits_rv, token_r[:, None], axis=-1)
    total_r1 = jax.nn.logsumexp(logits_rv, axis=-1, keepdims=True)
    logprob_r = (chosen_r1 - total_r1)[:, 0]

    def most_likely(logits_rv, chosen_r1, total_r1):
        return _most_likely(logits_rv, chosen_r1, total_r1, top)

    def nothing(logits_rv, chosen_r1, total_r1):
        # Derived from the operands so that under shard_map both branches vary over the same axes.
        zero_rk = jnp.broadcast_to(0 * logits_rv[:, :1], (logits_rv.shape[0], top))
        return zero_rk[:, 0].astype(jnp.int32), zero_rk.astype(jnp.int32), zero_rk

    rank_r, top_token_rk, top_logprob_rk = jax.lax.cond(
        jnp.any(state.top), most_likely, nothing, logits_rv, chosen_r1, total_r1
    )
    return Sampled(token_r, logprob_r, rank_r, top_token_rk, top_logprob_rk)


def scored(logits_rv: jax.Array, token_r: jax.Array, top: int = MAX_LOGPROBS) -> Sampled:
    """The logprobs and ranks of given tokens, and the most likely tokens."""
    chosen_r1 = jnp.take_along_axis(logits_rv, token_r[:, None], axis=-1)
    total_r1 = jax.nn.logsumexp(logits_rv, axis=-1, keepdims=True)
    likely = _most_likely(logits_rv, chosen_r1, total_r1, top)
    return Sampled(token_r, (chosen_r1 - total_r1)[:, 0], *likely)


def _most_likely(
    logits_rv: jax.Array, chosen_r1: jax.Array, total_r1: jax.Array, top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ranks of chosen logits, and the most likely tokens with their logprobs."""
    top_logit_rk, top_token_rk = jax.lax.top_k(logits_rv, top)
    rank_r = 1 + jnp.sum(logits_rv > chosen_r1, axis=-1, dtype=jnp.int32)
    return rank_r, top_token_rk.astype(jnp.int32), top_logit_rk - total_r1


def masked(logits_rv: jax.Array, allowed_rw: jax.Array) -> jax.Array:
    """Set the logits of tokens that are not allowed to -inf."""
    bit_rwb = (allowed_rw[:, :, None] >> jnp.arange(32)[None, None]) & 1
    allowed_rv = bit_rwb.reshape(len(allowed_rw), -1)[:, : logits_rv.shape[1]]
    return jnp.where(allowed_rv == 1, logits_rv, -jnp.inf)


def adjusted(logits_rv: jax.Array, changes: Adjustments) -> jax.Array:
    """Apply biases and penalties to the logits.

    Biases are added. The repetition penalty divides positive logits of known tokens and multiplies
    negative ones. The frequency penalty is subtracted once for each time the token is in the
    output, the presence penalty once if it is there at all.
    """
    rows, vocab = logits_rv.shape
    row_r1 = jnp.arange(rows)[:, None]
    bias_rb = jnp.where(changes.bias_token >= 0, changes.bias_token, vocab)
    logits_rv = logits_rv.at[row_r1, bias_rb].add(changes.bias, mode="drop")

    known_rh = jnp.where(changes.history >= 0, changes.history, vocab)
    seen_rv = jnp.zeros((rows, vocab), bool).at[row_r1, known_rh].set(True, mode="drop")
    penalty_r1 = changes.repetition_penalty[:, None]
    punished_rv = jnp.where(logits_rv > 0, logits_rv / penalty_r1, logits_rv * penalty_r1)
    logits_rv = jnp.where(seen_rv, punished_rv, logits_rv)

    is_output_rh = jnp.arange(known_rh.shape[1])[None] >= changes.prompt_length[:, None]
    output_rh = jnp.where(is_output_rh, known_rh, vocab)
    count_rv = jnp.zeros_like(logits_rv).at[row_r1, output_rh].add(1.0, mode="drop")
    logits_rv -= changes.frequency_penalty[:, None] * count_rv
    return logits_rv - jnp.where(count_rv > 0, changes.presence_penalty[:, None], 0)


def kept_tokens(logits_rv: jax.Array, state: SamplingState) -> tuple[jax.Array, jax.Array]:
    """Scaled logits, float32 [r, v], and the mask, bool [r, v], of tokens that can be drawn.

    With p = softmax(logits / temperature): min-p keeps tokens with p >= min_p max(p). Of these,
    top-k keeps the tokens at least as likely as the k-th. With p renormalised over these, top-p
    keeps every token for which the more likely tokens sum to less than top_p.
    """
    warm_r1 = jnp.where(state.temperature > 0, state.temperature, 1)[:, None]
    scaled_rv = logits_rv / warm_r1
    scaled_rv = scaled_rv - jnp.max(scaled_rv, axis=-1, keepdims=True)
    kept_rv = (scaled_rv >= jnp.log(state.min_p)[:, None]) & jnp.isfinite(scaled_rv)
    weight_rv = jnp.exp(scaled_rv)

    def narrow(stage: jax.Array, kept_rv: jax.Array) -> jax.Array:
        """Stage 0 counts tokens for top-k, stage 1 sums weights for top-p."""
        measure_rv = jnp.where(kept_rv, jnp.where(stage == 0, 1, weight_rv), 0)
        top_p_r = jnp.where(state.top_p < 1, state.top_p * jnp.sum(measure_rv, axis=-1), jnp.inf)
        top_k_r = jnp.where(state.top_k > 0, state.top_k.astype(jnp.float32), jnp.inf)
        limit_r = jnp.where(stage == 0, top_k_r, top_p_r)
        return kept_rv & _few_above(scaled_rv, measure_rv, limit_r)

    # One loop for both stages, so that `narrow` is compiled once; unused stages are skipped.
    first = jnp.where(jnp.any(state.top_k > 0), 0, 1)
    last = jnp.where(jnp.any(state.top_p < 1), 2, 1)
    kept_rv = jax.lax.fori_loop(first, last, narrow, kept_rv)
    return scaled_rv, kept_rv


def _draw(logits_rv: jax.Array, state: SamplingState) -> jax.Array:
    """int32 [r]: a kept token, drawn with its probability.

    The draw uses the Gumbel-max trick in two stages: first a block of the vocabulary by its sum of
    weights, then a token of the block. A small error in the logits, as from another batch or
    server, changes the choice with a small probability only; in a draw from cumulative sums, every
    boundary would move. A single stage would take a random number and two logarithms per token; two
    stages take a fraction of that.
    """
    scaled_rv, kept_rv = kept_tokens(logits_rv, state)
    weight_rv = jnp.where(kept_rv, jnp.exp(scaled_rv), 0)
    rows, vocab = weight_rv.shape
    padded_rv = jnp.pad(weight_rv, ((0, 0), (0, -vocab % _BLOCK)))
    weight_rbj = padded_rv.reshape(rows, -1, _BLOCK)

    def keys(seed, position):
        return jax.random.split(jax.random.fold_in(jax.random.key(seed), position))

    key_r2 = jax.vmap(keys)(state.seed, state.position)
    block_r = _gumbel_max(jnp.sum(weight_rbj, axis=-1), key_r2[:, 0])
    index_r = _gumbel_max(weight_rbj[jnp.arange(rows), block_r], key_r2[:, 1])
    return block_r * _BLOCK + index_r


def _gumbel_max(weight_rj: jax.Array, key_r: jax.Array) -> jax.Array:
    """int32 [r]: an index, drawn with probability proportional to its weight, never of weight 0."""
    noise_rj = jax.vmap(lambda key: jax.random.gumbel(key, weight_rj.shape[1:]))(key_r)
    return jnp.argmax(jnp.log(weight_rj) + noise_rj, axis=-1).astype(jnp.int32)


def _few_above(scaled_rv: jax.Array, weight_rv: jax.Array, limit_r: jax.Array) -> jax.Array:
    """bool [r, v]: whether the weights of all larger logits sum to less than the limit.

    The sum of the weights above a threshold falls as the threshold rises, so bisection finds the
    lowest threshold whose sum stays below the limit. Logits are at most 0, so their bit patterns,
    read as unsigned integers, grow as the logits fall; 31 halvings (the sign is fixed) find the
    exact threshold.

    Args:
        scaled_rv: float32 [r, v], at most 0.
        weight_rv: float32 [r, v], not negative.
        limit_r: float32 [r], above 0.
    """
    depth_rv = jax.lax.bitcast_convert_type(jnp.abs(scaled_rv), jnp.int32)

    def halve(_, bounds):
        low_r, high_r = bounds
        middle_r = low_r + (high_r - low_r + 1) // 2
        above_r = jnp.sum(jnp.where(depth_rv < middle_r[:, None], weight_rv, 0), axis=-1)
        fits_r = above_r < limit_r
        return jnp.where(fits_r, middle_r, low_r), jnp.where(fits_r, high_r, middle_r - 1)

    infinity = np.float32(np.inf).view(np.int32)
    low_r = 0 * depth_rv[:, 0]
    deepest_r, _ = jax.lax.fori_loop(0, 31, halve, (low_r, jnp.full_like(low_r, infinity)))
    return depth_rv <= deepest_r[:, None]
