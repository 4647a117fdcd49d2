"""The placement algorithms by name.

A policy is a function from a checked `Problem` to a `Placement`:
every expert is somewhere, nobody exceeds its capacity, and equal inputs give equal results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dance_jax.config import UserError
from dance_jax.placement.core import Placement
from dance_jax.placement.cost import Cost
from dance_jax.placement.policies.dance import dance
from dance_jax.placement.policies.uniform import uniform
from dance_jax.placement.problem import Problem

Policy = Callable[[Problem], Placement]

POLICIES: dict[str, Policy] = {
    "uniform": uniform,
    "dance": dance,
}


def place(
    policy: str,
    counts: np.ndarray,
    capacities: Sequence[int] | np.ndarray,
    *,
    routes: Sequence[np.ndarray] | None = None,
    devices: Sequence[int] | np.ndarray | None = None,
    cost: Cost | None = None,
    previous: Placement | None = None,
    seed: int = 0,
) -> Placement:
    """Decides which server holds which experts.

    >>> counts = np.array([[[9, 5, 1, 0]], [[0, 1, 5, 9]]])
    >>> place("dance", counts, [2, 2]).resident.astype(int).tolist()
    [[[1, 1, 0, 0]], [[0, 0, 1, 1]]]

    Args:
        policy: a name in POLICIES.
        counts: [servers, layers, experts], expert calls of the requests arriving at each server,
            taken as they are; where a server has none in a layer its experts count the same.
        capacities: int [servers], expert slots.
        routes: per server int [tokens, layers, k], for policies that look at whole tokens.
        devices: int [servers], devices of each server, default 1.
        cost: seconds per hidden state, per call and per layer, for policies that predict time;
            default: `Cost.reference`.
        previous: the placement in force, for policies that keep churn low.
        seed: for policies that draw at random.

    Returns:
        A placement that covers every expert within the capacities.

    Raises:
        UserError: the policy is unknown, an input is malformed, or slots are missing.
    """
    if policy not in POLICIES:
        raise UserError(f"unknown policy {policy!r}; there are {', '.join(POLICIES)}")
    problem = Problem.checked(
        counts,
        capacities,
        routes=routes,
        devices=devices,
        cost=cost,
        previous=previous,
        seed=seed,
    )
    placement = POLICIES[policy](problem)
    placement.validate(problem.capacities)
    return placement
