"""Placement problems of every kind for hypothesis, and the rule of visits in plain Python."""

import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import strategies as st

from dance_jax.placement.policies.latency import Search

#: Servers, layers, experts; every shape compiles each policy once.
SHAPES = [(3, 4, 8), (1, 3, 4), (4, 2, 6)]


def shorten_annealing(patch: pytest.MonkeyPatch, times: int) -> None:
    """Divides the rounds of every annealing of `latency`."""
    module = sys.modules[Search.__module__]
    for name in ("SEARCH", "REFINE", "SETTLE"):
        schedule = getattr(module, name)
        patch.setattr(module, name, schedule._replace(rounds=schedule.rounds // times))


def plain_servers(held: np.ndarray, needed: np.ndarray, order: Sequence[int]) -> list[int]:
    """Which server serves each expert of one token, -1: none.

    Args:
        held: bool [k, servers].
        needed: bool [k].
        order: servers, those that are preferred first.
    """
    found = [-1] * len(held)
    while left := [k for k in range(len(held)) if needed[k] and found[k] < 0]:
        best = max(order, key=lambda n: sum(held[k, n] for k in left))
        served = [k for k in left if held[k, best]]
        if not served:
            break
        for k in served:
            found[k] = best
    return found


def random_order(rng: np.random.Generator, servers: int) -> np.ndarray:
    """In which order each server prefers to call the others, itself last: int32 [n, n]."""
    rank_nm = rng.random((servers, servers)) + np.eye(servers)
    return rank_nm.argsort(1).astype(np.int32)


def random_resident(
    rng: np.random.Generator, shape: tuple[int, int, int], density: float = 0.3, holders: int = 1
) -> np.ndarray:
    """Every expert on `holders` servers at least: bool [servers, layers, experts]."""
    rank_nle = rng.random(shape).argsort(0).argsort(0)
    return (rng.random(shape) < density) | (rank_nle < holders)


def preferring_routes(seed: int, shape: tuple[int, int, int, int], tokens: int) -> list[np.ndarray]:
    """Workloads with their own preferences: per server int [tokens, layers, k].

    Args:
        shape: servers, layers, experts, k.
    """
    servers, layers, experts, k = shape
    rng = np.random.default_rng(seed)
    return [
        np.argsort(
            -(rng.gumbel(size=(layers, experts)) + rng.gumbel(size=(tokens, layers, experts)))
        )[:, :, :k]
        for _ in range(servers)
    ]


def draw_capacities(draw, rng, servers, total, holders=1):
    """Slots of unequal servers, from just enough for all copies to more than everything."""
    spare = draw(st.sampled_from([0, 1, total // 3, total * servers]))
    weights = rng.gamma(draw(st.sampled_from([0.1, 5.0])), size=servers) + 1e-9
    capacities = rng.multinomial(holders * total + spare, weights / weights.sum())
    # Slots above a whole copy of the model are of no use; all copies must still fit.
    missing = holders * total - int(np.minimum(capacities, total).sum())
    for n in range(servers):
        more = min(max(missing, 0), total - min(int(capacities[n]), total))
        capacities[n] += more
        missing -= more
    return capacities


def problems():
    """Counts of every kind, and capacities from just enough to more than everything."""
    return held_problems(1).map(lambda problem: problem[:2])


@st.composite
def held_problems(draw, most, least=1):
    """As `problems`, with a number of holders that every expert needs."""
    servers, layers, experts = draw(st.sampled_from([s for s in SHAPES if s[0] >= least]))
    holders = draw(st.integers(least, min(most, servers)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (servers, layers, experts)
    counts = {
        "skewed": lambda: rng.gamma(0.2, size=shape),
        "few": lambda: rng.integers(0, 3, shape),
        "large": lambda: rng.integers(0, 2**40, shape),
        "flat": lambda: np.full(shape, 7),
        "zero": lambda: np.zeros(shape),
        "one expert": lambda: np.broadcast_to(np.arange(experts) == 1, shape) * 5,
        "layers differ": lambda: rng.gamma(rng.choice([0.02, 5.0], (1, layers, 1)), size=shape),
    }[
        draw(
            st.sampled_from(
                ["skewed", "few", "large", "flat", "zero", "one expert", "layers differ"]
            )
        )
    ]()
    return counts, draw_capacities(draw, rng, servers, layers * experts, holders), holders
