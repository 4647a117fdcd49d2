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
from dance_jax.placement.policies.latency import MOST_SERVERS, latency
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
    """The policy itself, or `optimal` for `latency` where that cannot place; see `why_not`.

    >>> usable("latency", None), usable("dance", None)
    ('optimal', 'dance')
    """
    return "optimal" if why_not(policy, routes) else policy


def why_not(policy: str, routes: Sequence[np.ndarray] | None) -> str:
    """Why a policy cannot place, in words; "": it can.

    Args:
        routes: per server int [tokens, layers, k]; None: not known.
    """
    if policy != "latency":
        return ""
    if routes is None or not any(map(len, routes)):
        return "latency needs routes, there are none"
    if len(routes) > MOST_SERVERS:
        return f"latency takes too long for more than {MOST_SERVERS} servers"
    return ""


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
            where it cannot, `optimal` takes its place and the log says why.
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
    if why := why_not(policy, routes):
        log.warning("%s: optimal places instead", why)
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
