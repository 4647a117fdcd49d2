"""`layers`: whole layers to servers, statistics ignored; a control, not a baseline of the paper."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dance_jax.placement.core import Placement
from dance_jax.placement.policies.rounding import largest_remainder
from dance_jax.placement.problem import Problem


def _starts(capacities_n: jax.Array, layers: int, experts: int) -> jax.Array:
    """The start of each server's window of experts: int64 [n].

    No window starts after the end of the window before it, nor so early that the memory from there
    on does not reach the last expert. So every expert is in a window. In between, a window starts
    at the begin of a layer that is nearest to an even cut, or at the place nearest to the cut if no
    layer begins there.
    """
    total = layers * experts
    quota_n = largest_remainder(jnp.int64(total), capacities_n)
    cut_n = jnp.cumsum(quota_n) - quota_n
    from_here_n = capacities_n.sum() - jnp.cumsum(capacities_n) + capacities_n
    earliest_n = jnp.maximum(total - from_here_n, 0)

    def next_window(
        latest: jax.Array, server: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array]:
        cut, earliest, capacity = server
        first, last = -(-earliest // experts), latest // experts
        nearest = (cut + experts // 2) // experts
        whole = jnp.clip(nearest, first, last) * experts
        start = jnp.where(first <= last, whole, jnp.clip(cut, earliest, latest))
        return jnp.minimum(start + capacity, total), start

    return lax.scan(next_window, jnp.int64(0), (cut_n, earliest_n, capacities_n))[1]


@functools.partial(jax.jit, static_argnames=("layers", "experts"))
def _windows(capacities_n: jax.Array, layers: int, experts: int) -> jax.Array:
    """Each server's window of consecutive experts, in order of layers: bool [n, l, e]."""
    start_n1 = _starts(capacities_n, layers, experts)[:, None]
    place_1x = jnp.arange(layers * experts, dtype=jnp.int64)[None, :]
    # After the last layer a window continues in the first.
    resident_nx = (place_1x - start_n1) % (layers * experts) < capacities_n[:, None]
    return resident_nx.reshape(-1, layers, experts)


def layers(problem: Problem) -> Placement:
    """Gives every server whole layers, as many as it has memory for, in server order.

    A control: a token whose layer is elsewhere sends one hidden state for all its experts, so there
    are few transfers, and the servers with the layer compute all of it. Experts are numbered layer
    by layer; server n holds the `capacity[n]` experts from its start on, and continues with the
    first after the last. Starts cut the model in proportion to memory, at the nearest layer if
    memory allows; a window that starts or ends inside a layer shares that layer.

    Worked example: capacities 253, 253, 506 and 24 layers x 32 experts: cuts at layers 0, 6 and
    12. Server 0 holds layers 0-6 and experts 0-28 of layer 7, server 1 layers 6-12 and 0-28 of 13,
    server 2 layers 12-23, 0-2 and experts 0-25 of layer 3.
    """
    _, num_layers, experts = problem.counts.shape
    with jax.enable_x64(True):
        capacities_n = jnp.asarray(problem.capacities)
        return Placement(np.asarray(_windows(capacities_n, num_layers, experts)))
