"""Times to solve, on synthetic skewed statistics."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from .figures import LATENCY, OPTIMAL, Say, solve
from .setups import MEMORY, Setup, devices_of, normalised
from .traces import count, synthetic_trace

#: Memory for exactly one copy, where servers can only swap experts, and for a little more.
TIGHT = (1.0, 1.05)
#: Servers, layers and experts: DeepSeek-V2-Lite, and DeepSeek-V3 on few and on many servers.
SMALL, LARGE, LARGEST = (3, 26, 64), (8, 58, 256), (64, 58, 256)
TOP_K = 6
#: Tokens of each server, for policies that need routes.
TOKENS = {SMALL: 4000, LARGEST: 1000}
#: Runs of one case: LEAST_RUNS, and up to MOST_RUNS while all take less than SECONDS.
LEAST_RUNS, MOST_RUNS, SECONDS = 2, 15, 2.0
#: Milliseconds that a case may take, by policy and sizes.
LIMITS_MS = {
    ("dance", SMALL): 50.0,
    (OPTIMAL, SMALL): 50.0,
    (LATENCY, SMALL): 20_000.0,
    (LATENCY, LARGEST): 60_000.0,
    (OPTIMAL, LARGE): 1_000.0,
    (OPTIMAL, LARGEST): 10_000.0,
}


@dataclasses.dataclass(frozen=True)
class Speed:
    """One case; times are after a first run, which compiles."""

    policy: str
    servers: int
    layers: int
    experts: int
    memory: float
    runs: int
    best_ms: float
    median_ms: float
    #: None if there is no target.
    limit_ms: float | None
    local: float
    bound: float | None


def skewed_counts(servers: int, layers: int, experts: int, seed: int = 0) -> np.ndarray:
    """Calls with favourites of each server: float64 [servers, layers, experts].

    An expert's logit is the sum of a part that all servers share and a part of the server's own.
    """
    rng = np.random.default_rng(seed)
    shared_le = rng.normal(size=(layers, experts))
    own_nle = rng.normal(size=(servers, layers, experts))
    return normalised(np.round(1000 * np.exp(shared_le + own_nle)))


def setup_of(sizes: tuple[int, int, int], memory: float, seed: int = 0) -> Setup:
    """A setup of that size with counts alone."""
    counts = skewed_counts(*sizes, seed)
    return Setup(_of_size(sizes, memory), counts, devices_of(sizes[0]), memory)


def _of_size(sizes: tuple[int, int, int], memory: float) -> str:
    return f"{' x '.join(map(str, sizes))}, memory {memory:g} x the model"


def with_routes(
    sizes: tuple[int, int, int], tokens: int, memory: float = MEMORY, seed: int = 0
) -> Setup:
    """A setup of that size with routes of `tokens` tokens of each server."""
    servers, layers, experts = sizes
    topics = [str(n) for n in range(servers)]
    trace = synthetic_trace(tokens, layers, experts, TOP_K, seed, topics)
    routes = tuple(trace.routes.values())
    counts = normalised(np.stack([count(route, experts) for route in routes]))
    title = f"{_of_size(sizes, memory)}, {tokens:,} tokens each"
    return Setup(title, counts, devices_of(servers), memory, routes, routes)


def cases(policies: Iterable[str]) -> Iterator[tuple[str, Setup]]:
    """All policies on SMALL, and OPTIMAL and LATENCY on larger sizes."""
    known = list(policies)
    of_counts = [policy for policy in known if policy != LATENCY]
    for memory in (MEMORY, *TIGHT):
        for policy in of_counts:
            yield policy, setup_of(SMALL, memory)
    if LATENCY in known:
        for sizes, tokens in TOKENS.items():
            yield LATENCY, with_routes(sizes, tokens)
    if OPTIMAL in known:
        for sizes in (LARGE, LARGEST):
            for memory in (*TIGHT, MEMORY):
                yield OPTIMAL, setup_of(sizes, memory)


def measure_speed(
    found: Iterable[tuple[str, Setup]], say: Say, seconds: float = SECONDS
) -> list[Speed]:
    """Measures all cases."""
    return [measure_case(policy, setup, say, seconds) for policy, setup in found]


def measure_case(policy: str, setup: Setup, say: Say, seconds: float) -> Speed:
    run: Callable[[], float] = lambda: solve(policy, setup)[1]  # noqa: E731
    placement, _ = solve(policy, setup)
    times = [run() for _ in range(LEAST_RUNS)]
    while len(times) < MOST_RUNS and sum(times) < seconds * 1e3:
        times.append(run())
    sizes = (setup.counts.shape[0], setup.counts.shape[1], setup.counts.shape[2])
    say(f"{setup.title}: {policy}, {min(times):,.1f} ms")
    return Speed(
        policy,
        *sizes,
        setup.memory,
        len(times),
        min(times),
        statistics.median(times),
        LIMITS_MS.get((policy, sizes)),
        placement.local_share(setup.counts),
        placement.upper_bound,
    )
