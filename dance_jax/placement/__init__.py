"""Which server holds which expert: statistics, policies, measures, and the shared tie rule."""

from dance_jax.config import DEFAULT_POLICY
from dance_jax.placement.activations import Activations
from dance_jax.placement.core import Layout, Placement, spread
from dance_jax.placement.cost import CallCost, Cost, LockStepCost
from dance_jax.placement.policies import POLICIES, place, usable, why_not
from dance_jax.placement.visit import choose_servers

__all__ = [
    "DEFAULT_POLICY",
    "POLICIES",
    "Activations",
    "CallCost",
    "Cost",
    "Layout",
    "LockStepCost",
    "Placement",
    "choose_servers",
    "place",
    "spread",
    "usable",
    "why_not",
]
