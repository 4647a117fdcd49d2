"""`redundance`: `uniform`, and free memory filled with random replicas; a baseline of the paper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dance_jax.placement.core import Placement
from dance_jax.placement.policies.rounding import fill
from dance_jax.placement.policies.uniform import blocks
from dance_jax.placement.problem import Problem


@jax.jit
def _with_replicas(resident_nle: jax.Array, capacities_n: jax.Array, key: jax.Array) -> jax.Array:
    """Fills every server with experts it does not hold, drawn at random: bool [n, l, e]."""
    draw_nle = jax.random.uniform(key, resident_nle.shape, jnp.float64)
    return fill(resident_nle, draw_nle, capacities_n)


def redundance(problem: Problem) -> Placement:
    """`uniform`, then replicas drawn at random until every server is full.

    The second baseline of DanceMoE (arXiv:2508.12851). Each server draws on its own, evenly among
    the (layer, expert) that it does not hold; neither what others hold nor calls matter. Equal
    seeds draw equal replicas.

    Worked example: capacities 253, 253, 506 and 24 x 32 experts: `uniform` puts 192, 192 and 384
    experts on the servers, so 61, 61 and 122 replicas are drawn from the 576, 576 and 384 others.
    """
    _, layers, experts = problem.counts.shape
    with jax.enable_x64(True):
        capacities_n = jnp.asarray(problem.capacities)
        resident_nle = blocks(capacities_n, layers, experts)
        key = jax.random.key(problem.seed)
        return Placement(np.asarray(_with_replicas(resident_nle, capacities_n, key)))
