"""Which server holds which expert: statistics, policies, metrics, and the shared tie rule."""

from dance_jax.placement.activations import Activations
from dance_jax.placement.core import Layout, Placement, spread
from dance_jax.placement.cost import Cost
from dance_jax.placement.policies import POLICIES, place
from dance_jax.placement.visit import choose_servers

__all__ = [
    "POLICIES",
    "Activations",
    "Cost",
    "Layout",
    "Placement",
    "choose_servers",
    "place",
    "spread",
]
