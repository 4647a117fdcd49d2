"""What is simulated: servers, tasks, requests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from dance_jax.bench.arrivals import Arrival, answer_lengths, limited, poisson
from dance_jax.config import EngineConfig, UserError
from dance_jax.placement.visit import MAX_SERVERS
from research.policies.traces import count
from research.simulator import Model, Requests, Server, Speed

#: DeepSeek-V2-Lite: hidden size 2048 in bfloat16.
DEEPSEEK_V2_LITE = Model(layers=26, experts=64, top_k=6, state_bytes=2 * 2048)
#: gpt-oss-20b: hidden size 2880 in bfloat16.
GPT_OSS_20B = Model(layers=24, experts=32, top_k=4, state_bytes=2 * 2880)
A100 = Speed(step=3.5e-3, token=20e-6, call=0.2e-6, expert=15e-6, round=0.1e-3)
#: Seconds from a server to the middle of the network.
DELAY_S = 0.1e-3
#: The engine's defaults on GPUs, with room for the longest request.
CONFIG = EngineConfig(max_model_len=8192, max_num_seqs=16, decode_rows=(4, 16), slice_rows=(8, 32))
#: Devices of the servers, in turn, and the most devices of a cluster in lock step: these are 24
#: servers, and the engine's limit is 31.
PATTERN, MOST_DEVICES = (1, 1, 2), 32
#: The share of the model's experts that each device holds.
MEMORY = 0.33
#: The exponent of the experts' Zipf distribution.
SKEW = 1.0
#: Tokens of each server that policies see, and as many others that are served.
TOKENS = 256
#: Tokens of lognormal prompts. Links of 100 Mbps could not carry longer ones every few seconds.
PROMPT_MEDIAN, PROMPT_SPREAD, LONGEST = 32, 0.7, 1024
#: Lengths of answers, as a share of those of dance_jax/bench.
ANSWER_SHARE = 1 / 3


@dataclasses.dataclass(frozen=True, eq=False)
class Tasks:
    """The experts that the requests of each server choose."""

    #: Per server int [tokens, layers, k]: tokens that policies see, and tokens that are served.
    fit: tuple[np.ndarray, ...]
    served: tuple[np.ndarray, ...]
    #: int64 [servers, layers, experts]: expert calls of `fit`.
    counts: np.ndarray

    @classmethod
    def of(cls, fit: Sequence[np.ndarray], served: Sequence[np.ndarray], experts: int) -> Tasks:
        return cls(tuple(fit), tuple(served), np.stack([count(route, experts) for route in fit]))


def devices_of(devices: int) -> tuple[int, ...]:
    """Devices of each server.

    >>> devices_of(8)
    (1, 1, 2, 1, 1, 2)

    Raises:
        UserError: they are not a multiple of the pattern's devices, or too many.
    """
    repeats, left = divmod(devices, sum(PATTERN))
    if left or not repeats:
        raise UserError(
            f"{devices} devices: servers have {PATTERN} in turn; a multiple of {sum(PATTERN)} is "
            "needed"
        )
    if (servers := len(PATTERN) * repeats) > MAX_SERVERS:
        raise UserError(f"{devices} devices are {servers} servers; the most are {MAX_SERVERS}")
    return PATTERN * repeats


def servers_with(devices: Sequence[int], model: Model, bandwidth: float) -> tuple[Server, ...]:
    """Servers whose devices hold MEMORY of the model each; bandwidth in bits per second."""
    # One slot more than the share, so that 4 devices hold a model of any size.
    slots = min(int(MEMORY * model.layers * model.experts) + 1, model.layers * model.experts)
    return tuple(Server(each, slots, A100, bandwidth, DELAY_S) for each in devices)


def skewed_tasks(servers: int, model: Model, seed: int) -> Tasks:
    """A task for each server, which does not depend on the number of servers."""
    drawn = [_zipf(2 * TOKENS, model, np.random.default_rng((seed, n))) for n in range(servers)]
    return Tasks.of(
        [route[:TOKENS] for route in drawn], [route[TOKENS:] for route in drawn], model.experts
    )


def _zipf(tokens: int, model: Model, rng: np.random.Generator) -> np.ndarray:
    """Routes of a task: int16 [tokens, layers, k]."""
    rank_le = np.argsort(rng.random((model.layers, model.experts)), axis=1)
    logit_le = -SKEW * np.log1p(rank_le, dtype=np.float32)
    drawn_tle = rng.standard_exponential((tokens, *rank_le.shape), dtype=np.float32)
    # A draw may be 0, which has no logarithm.
    noise_tle = -np.log(np.maximum(drawn_tle, np.finfo(np.float32).tiny))
    best_tle = np.argpartition(-(logit_le + noise_tle), model.top_k - 1, axis=2)
    return best_tle[:, :, : model.top_k].astype(np.int16)


def poisson_requests(servers: int, interval_s: float, count: int, seed: int) -> Requests:
    """The first `count` requests; `interval_s` is the mean interval on each server."""
    arrivals = limited(poisson([1 / interval_s] * servers, seed), requests=count)
    rng = np.random.default_rng(seed)
    drawn = rng.lognormal(np.log(PROMPT_MEDIAN), PROMPT_SPREAD, count)
    prompts = np.rint(drawn).clip(1, LONGEST).astype(int)
    answers = np.array(answer_lengths(count, LONGEST, rng)) * ANSWER_SHARE
    return requests_of(
        [
            dataclasses.replace(arrival, prompt_tokens=int(prompt), output_tokens=math.ceil(answer))
            for arrival, prompt, answer in zip(arrivals, prompts, answers, strict=True)
        ]
    )


def requests_of(arrivals: Sequence[Arrival]) -> Requests:
    """Requests from arrivals; a prompt that exceeds the context loses its begin."""
    rows = [(a.at_s, a.server, a.prompt_tokens or 1, a.output_tokens or 1) for a in arrivals]
    at, server, prompt, output = (np.array(column) for column in zip(*rows, strict=True))
    output = np.minimum(output, CONFIG.max_model_len - 1)
    return Requests(at, server, np.minimum(prompt, CONFIG.max_model_len - output), output)
