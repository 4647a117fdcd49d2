"""Loads for the systems, and the figures measured under them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pathlib
import re
import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks.programs.gguf_file import token_name
from dance_jax.bench.client import Answer, Call
from dance_jax.bench.cluster import RunError
from dance_jax.bench.drive import open_loop
from dance_jax.bench.figures import first_token_s, per_token_s

from .running import Running

#: Requests per host that placements are fitted to, and their seed.
FIT_REQUESTS, FIT_SEED = 16, 1 << 20
#: First token of the hosts' ranges; lower tokens are special.
FIRST_TOKEN = 2


@dataclasses.dataclass(frozen=True)
class Load:
    """A number of concurrent users, with one request each."""

    name: str
    users: int
    #: Tokens of each prompt.
    prompt: int = 64
    #: Tokens of each answer.
    tokens: int = 64

    def calls(self, hosts: int, vocabulary: int, seed: int) -> list[Call]:
        """Return the calls of all users; the same for the same seed."""
        found = []
        for user in range(self.users):
            host = user % hosts
            tokens = own_tokens(host, hosts, vocabulary)
            rng = np.random.default_rng([seed, self.users, self.prompt, user])
            prompt = rng.integers(tokens.start, tokens.stop, self.prompt).tolist()
            found.append(Call(host, prompt, self.tokens))
        return found


LOADS = (
    Load("1 user", 1),
    Load("3 users", 3),
    Load("12 users", 12),
    Load("prompt of 500", 1, prompt=500, tokens=1),
)
#: Sent before anything is measured.
WARM = Load("warm", 6, tokens=16)


def own_tokens(host: int, hosts: int, vocabulary: int) -> range:
    """Return the range of the vocabulary that only this host's users send."""
    width = (vocabulary - FIRST_TOKEN) // hosts
    return range(FIRST_TOKEN + host * width, FIRST_TOKEN + (host + 1) * width)


@dataclasses.dataclass(frozen=True)
class Figures:
    """Figures of a system under a load, as defined in `benchmarks.systems`.

    Attributes:
        decode, total: in tokens per second; decode is None if answers have one token.
        ttft_s: in seconds.
        cpu_s: in seconds per output token.
        bytes: per output token.
        outputs: tokens of each answer.
    """

    decode: float | None
    total: float
    ttft_s: float
    cpu_s: float
    bytes: float
    outputs: list[list[int]]


def measure(system: Running, calls: Sequence[Call]) -> Figures:
    """Send all calls at once and measure the system.

    Raises:
        RunError: an answer is not complete.
    """
    before = system.processor_s(), system.interface_bytes()
    answers = ask(system, calls)
    spent = system.processor_s() - before[0]
    moved = system.interface_bytes() - before[1]
    tokens = sum(answer.output_tokens for answer in answers)
    per_token = per_token_s(answers)
    return Figures(
        decode=1 / statistics.median(per_token) if per_token else None,
        total=tokens / max(answer.piece_s[-1] for answer in answers),
        ttft_s=statistics.median(first_token_s(answers)),
        cpu_s=spent / tokens,
        bytes=moved / tokens,
        outputs=[output(answer) for answer in answers],
    )


def ask(system: Running, calls: Sequence[Call]) -> list[Answer]:
    """Send all calls at once and return the answers.

    Raises:
        RunError: an answer is not complete.
    """
    answers = asyncio.run(open_loop(system.api, calls, lambda: None))
    for answer in answers:
        if answer.error is not None:
            raise RunError(f"a request failed: {answer.error}")
        if answer.output_tokens != answer.call.max_tokens:
            raise RunError(
                f"an answer has {answer.output_tokens} tokens instead of {answer.call.max_tokens}"
            )
    return answers


def output(answer: Answer) -> list[int]:
    """Parse an answer's tokens from their names; special tokens are left out."""
    named = map(int, re.findall(r"<(\d+)>", answer.text))
    return [token for token in named if token >= FIRST_TOKEN]


def fit_prompts(path: pathlib.Path, names: Sequence[str], vocabulary: int) -> None:
    """Write a --prompts file of other prompts of the same users, to fit placements to."""
    calls = Load("fit", len(names) * FIT_REQUESTS).calls(len(names), vocabulary, FIT_SEED)
    lines = [
        json.dumps(
            {
                "prompt": " ".join(token_name(int(token)) for token in call.prompt),
                "server": names[call.server],
            }
        )
        for call in calls
    ]
    path.write_text("\n".join(lines) + "\n")
