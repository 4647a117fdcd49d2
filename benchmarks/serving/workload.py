"""What is asked in a run under load: calls from arrivals and prompts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from dance_jax.launch.cli.prompts import Prompt
from dance_jax.models.tokenizer import Tokenizer

from .arrivals import Arrival, answer_lengths
from .client import Call
from .texts import Texts


def calls_of_texts(
    arrivals: Sequence[Arrival], texts: Texts, longest: int, context: int, seed: int
) -> list[Call]:
    """Prompts as they are, or cut to the lengths that the arrivals have.

    Args:
        longest: tokens of an answer at most.
        context: tokens of a prompt and its answer at most; prompts are cut to what is left.
        seed: of lengths and texts.
    """
    rng = np.random.default_rng(seed)
    lengths = answer_lengths(len(arrivals), longest, rng)
    found = []
    for arrival, drawn in zip(arrivals, lengths, strict=True):
        max_tokens = min(arrival.output_tokens or drawn, longest, context - 1)
        room = context - max_tokens
        if arrival.prompt_tokens is None:
            prompt = texts.whole(arrival.server, rng)[:room]
        else:
            prompt = texts.cut(arrival.server, min(arrival.prompt_tokens, room), rng)
        found.append(Call(arrival.server, prompt, max_tokens, arrival.at_s))
    return found


def calls_of_prompts(
    arrivals: Sequence[Arrival], prompts: Sequence[Prompt], tokenizer: Tokenizer
) -> list[Call]:
    """Each server's prompts in turn, as often as requests arrive; answers end where they end."""
    own: dict[int, list[Call]] = {}
    for prompt in prompts:
        tokens = tokenizer.encode(prompt.text)
        own.setdefault(prompt.rank, []).append(
            Call(
                prompt.rank,
                tokens,
                prompt.max_tokens,
                temperature=prompt.temperature,
                ignore_eos=False,
            )
        )
    turns = {rank: itertools.cycle(calls) for rank, calls in own.items()}
    return [
        dataclasses.replace(next(turns[arrival.server]), arrival_s=arrival.at_s)
        for arrival in arrivals
    ]
