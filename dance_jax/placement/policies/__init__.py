"""The placement algorithms by name.

A policy is a function from a checked `Problem` to a `Placement`:
every expert is somewhere, nobody exceeds its capacity, and equal inputs give equal results. `place`
repairs the placements of policies that do not look at `Problem.holders`.
"""

from __future__ import annotations

import dataclasses
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
from dance_jax.placement.policies.repair import repaired
from dance_jax.placement.policies.smartmoe import smartmoe
from dance_jax.placement.policies.uniform import uniform
from dance_jax.placement.problem import Problem


@dataclasses.dataclass(frozen=True)
class Policy:
    """A placement algorithm, and what it needs."""

    place: Callable[[Problem], Placement]
    #: It needs routes: counts are not enough.
    needs_routes: bool = False
    #: It weighs what links and devices cost (`Problem.cost`).
    weighs_cost: bool = False


POLICIES: dict[str, Policy] = {
    "uniform": Policy(uniform),
    "redundance": Policy(redundance),
    "layers": Policy(layers),
    "smartmoe": Policy(smartmoe),
    "eplb": Policy(eplb),
    "dance": Policy(dance),
    "optimal": Policy(optimal),
    "latency": Policy(latency, needs_routes=True, weighs_cost=True),
}

#: The policy that replaces policies that lack routes.
WITHOUT_ROUTES = "optimal"

log = logging.getLogger(__name__)


def usable(policy: str, routes: Sequence[np.ndarray] | None) -> str:
    """The policy itself, or WITHOUT_ROUTES if it cannot place; see `why_not`.

    >>> usable("latency", None), usable("dance", None)
    ('optimal', 'dance')
    """
    return WITHOUT_ROUTES if why_not(policy, routes) else policy


def why_not(policy: str, routes: Sequence[np.ndarray] | None) -> str:
    """The reason why a policy cannot place; "" if it can.

    Args:
        policy: a name in POLICIES.
        routes: per server int [tokens, layers, k]; None if they are not known.

    Raises:
        UserError: the policy is unknown.
    """
    if policy not in POLICIES:
        raise UserError(f"unknown policy {policy!r}; there are {', '.join(POLICIES)}")
    if POLICIES[policy].needs_routes and (routes is None or not any(map(len, routes))):
        return f"{policy} needs routes, there are none"
    return ""


def place(
    policy: str,
    counts: np.ndarray,
    capacities: Sequence[int] | np.ndarray,
    *,
    holders: int = 1,
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
        counts: [servers, layers, experts], expert calls of the requests that arrive at each server.
            They are not normalised. A server without counts in a layer is taken to use all its
            experts equally.
        capacities: int [servers], expert slots.
        holders: servers that must hold each expert, so that any holders - 1 of them may be lost.
        routes: per server int [tokens, layers, k], for policies that need them; without routes
            WITHOUT_ROUTES places instead, and the log says why.
        devices: int [servers], devices of each server; default: as in `cost`, or else 1.
        cost: the cost of the exchange in use, for policies that predict time; default:
            `CallCost.reference`.
        previous: the placement in force, for policies that keep churn low.
        seed: for policies that draw at random.

    Returns:
        A placement within the capacities in which `holders` servers or more hold each expert.

    Raises:
        UserError: the policy is unknown, an input is malformed, or slots are missing.
    """
    if why := why_not(policy, routes):
        policy = usable(policy, routes)
        log.warning("%s: %s places instead", why, policy)
    problem = Problem.checked(
        counts,
        capacities,
        holders=holders,
        routes=routes,
        devices=devices,
        cost=cost,
        previous=previous,
        seed=seed,
    )
    placement = POLICIES[policy].place(problem)
    placement.validate(problem.capacities)
    return repaired(placement, problem)
