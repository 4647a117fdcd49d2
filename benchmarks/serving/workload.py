"""Requests of a run under load, from arrivals and prompts."""

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
    """Make calls with whole prompts, or with prompts cut to the arrivals' lengths if given.

    Args:
        arrivals: times, servers, and lengths if known.
        texts: prompts of each server.
        longest: maximum tokens of an answer.
        context: maximum tokens of a prompt and its answer; longer prompts are cut.
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
    """Make calls with each server's prompts in turn, repeated as needed.

    Answers may end before max_tokens, at an end-of-sequence token.
    """
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
