"""The placement algorithms by name.

A policy is a function from a checked `Problem` to a `Placement`:
every expert is somewhere, nobody exceeds its capacity, and equal inputs give equal results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from dance_jax.config import UserError
from dance_jax.placement.core import Placement
from dance_jax.placement.cost import Cost
from dance_jax.placement.policies.dance import dance
from dance_jax.placement.policies.eplb import eplb
from dance_jax.placement.policies.latency import latency
from dance_jax.placement.policies.layers import layers
from dance_jax.placement.policies.optimal import optimal
from dance_jax.placement.policies.redundance import redundance
from dance_jax.placement.policies.smartmoe import smartmoe
from dance_jax.placement.policies.uniform import uniform
from dance_jax.placement.problem import Problem

Policy = Callable[[Problem], Placement]

POLICIES: dict[str, Policy] = {
    "uniform": uniform,
    "redundance": redundance,
    "layers": layers,
    "smartmoe": smartmoe,
    "eplb": eplb,
    "dance": dance,
    "optimal": optimal,
    "latency": latency,
}

#: What places where nothing else is asked for.
DEFAULT_POLICY = "latency"

log = logging.getLogger(__name__)


def usable(policy: str, routes: Sequence[np.ndarray] | None) -> str:
    """The policy itself, or `optimal` for `latency` where no token's route is known.

    >>> usable("latency", None), usable("dance", None)
    ('optimal', 'dance')
    """
    known = routes is not None and any(len(route) > 0 for route in routes)
    return policy if policy != "latency" or known else "optimal"


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
        routes: per server int [tokens, layers, k], for `latency`, which looks at whole tokens;
            without any, `optimal` takes its place and the log says so.
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
    if usable(policy, routes) != policy:
        log.warning("%s needs routes, and counts alone are known: optimal places instead", policy)
        policy = usable(policy, routes)
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
