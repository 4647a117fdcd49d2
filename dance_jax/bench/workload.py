"""Requests of a run under load, from arrivals and prompts."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence

import numpy as np

from dance_jax.bench.arrivals import Arrival, answer_lengths
from dance_jax.bench.client import Call
from dance_jax.bench.texts import Texts, passage
from dance_jax.launch.cli.prompts import Prompt


def calls_of_texts(
    arrivals: Sequence[Arrival], texts: Texts, longest: int, context: int | None, seed: int
) -> list[Call]:
    """Make calls with whole prompts, or with prompts cut to the arrivals' lengths if given.

    Args:
        arrivals: times, servers, and lengths if known.
        texts: prompts of each server.
        longest: maximum tokens of an answer.
        context: maximum tokens of a prompt and its answer; longer prompts are cut. None if unknown.
        seed: of lengths and texts.
    """
    rng = np.random.default_rng(seed)
    lengths = answer_lengths(len(arrivals), longest, rng)
    most = sys.maxsize if context is None else context
    found = []
    for arrival, drawn in zip(arrivals, lengths, strict=True):
        max_tokens = min(arrival.output_tokens or drawn, longest, most - 1)
        room = most - max_tokens
        if arrival.prompt_tokens is None:
            prompt = texts.whole(arrival.server, rng)[:room]
        else:
            prompt = texts.cut(arrival.server, min(arrival.prompt_tokens, room), rng)
        found.append(Call(arrival.server, prompt, max_tokens, arrival.at_s))
    return found


def calls_of_passages(arrivals: Sequence[Arrival], longest: int, seed: int) -> list[Call]:
    """Make calls with random passages of the built-in text, for servers of any model.

    Answers may end before max_tokens, at an end-of-sequence token.

    Args:
        arrivals: times and servers.
        longest: maximum tokens of an answer.
        seed: of lengths and passages.
    """
    rng = np.random.default_rng(seed)
    lengths = answer_lengths(len(arrivals), longest, rng)
    return [
        Call(arrival.server, passage(rng), max_tokens, arrival.at_s, ignore_eos=False)
        for arrival, max_tokens in zip(arrivals, lengths, strict=True)
    ]


def calls_of_prompts(arrivals: Sequence[Arrival], prompts: Sequence[Prompt]) -> list[Call]:
    """Make calls with each server's prompts in turn, repeated as needed.

    Answers may end before max_tokens, at an end-of-sequence token.
    """
    own: dict[int, list[Call]] = {}
    for prompt in prompts:
        own.setdefault(prompt.rank, []).append(
            Call(
                prompt.rank,
                prompt.text,
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
