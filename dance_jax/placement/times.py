"""The time of a layer from what its tokens send and call: formulas of `cost`, for jit.

Where servers step on their own (`CallTimes`) a step of r rows of server n waits in a layer

    (1 - any) x own + any x max(own, wait)

with any = 1 - (1 - away)^r, own the seconds of its calls at home, which it computes while others
are out, and wait those of the slowest of the servers that it calls: the round trip, the bytes, on
its own link those to all of them, and the calls that are computed there. A server m is called with
probability 1 - (1 - sent[m])^r, as if rows and servers were independent. What others have to do
there comes on top for all layers together: servers are in different layers at the same time.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array, lax

from dance_jax.placement.flows import Flows


class Times(Protocol):
    """Predicted seconds per token of a server."""

    def layers(self, flows: Flows) -> tuple[Array, Array]:
        """Each layer by itself, and what it adds to what layers share.

        Returns:
            float [b, l]: seconds of each layer, as if it had links and devices for itself.
            float [l, x]: its part of `shared`'s load.
        """
        ...

    def shared(self, load: Array) -> Array:
        """Seconds that all layers together wait for each other, float [...].

        Args:
            load: [..., x], the sum over all layers.
        """
        ...


class CallTimes(NamedTuple):
    """See `cost.CallCost`, and above."""

    #: float [n] each.
    weight: Array
    state: Array
    call: Array
    round: Array
    #: float [r] each: rows of a step, and part of all steps that has so many.
    rows: Array
    steps: Array
    busy: Array

    def layers(self, flows: Flows) -> tuple[Array, Array]:
        call_11n, state_11n = self.call[None, None], self.state[None, None]
        own_bln = jnp.diagonal(flows.calls, axis1=-2, axis2=-1) * call_11n
        seconds_bln = jnp.zeros_like(own_bln)
        for rows, steps in zip(self.rows, self.steps, strict=True):
            seconds_bln = seconds_bln + steps * self._step(flows, own_bln * rows, rows)
        seconds_bl = seconds_bln @ self.weight / ((self.rows * self.steps).sum() * self._active)
        calls_blm = jnp.einsum("blnm,n->blm", flows.calls, self.weight)
        out_bln = flows.sent.sum(-1) * self.weight[None, None]
        ways_bln = out_bln + jnp.einsum("blnm,n->blm", flows.sent, self.weight)
        load = jnp.concatenate([calls_blm * call_11n, ways_bln * state_11n / 2], -1)
        return seconds_bl, load.mean(0)

    def shared(self, load: Array) -> Array:
        """Each call waits as long as its server computes for others meanwhile.

        Of a server that is busy for a part p of the time, one in p finds others before it. With the
        mean p of `busy`, that of each server is in proportion to its load.
        """
        load = load.reshape(*load.shape[:-1], 2, len(self.weight))
        mean = jnp.maximum(load.mean(-1), jnp.finfo(load.dtype).tiny)
        return self.busy * ((load**2).sum(-1) / mean).sum(-1) / self._active

    @property
    def _active(self) -> Array:
        """Servers with tokens."""
        return jnp.maximum((self.weight > 0).sum(), 1).astype(self.weight.dtype)

    def _step(self, flows: Flows, own_bln: Array, rows: Array) -> Array:
        """Seconds of a layer in a step of so many rows of each server: [b, l, n]."""
        tiny = float(jnp.finfo(own_bln.dtype).eps)
        any_bln = 1 - (1 - jnp.minimum(flows.away, 1)) ** rows
        visits = 1 - (1 - jnp.minimum(flows.sent, 1)) ** rows
        # Given that it is called at all.
        sent = rows * flows.sent / jnp.maximum(visits, tiny)
        calls = rows * flows.calls / jnp.maximum(visits, tiny)
        out_bln = rows * flows.sent.sum(-1) / jnp.maximum(any_bln, tiny) * self.state[None, None]
        moving = jnp.maximum(out_bln[..., None], sent * self.state[None, None, None])
        rounds_nm = self.round[:, None] + self.round[None]
        seconds = rounds_nm[None, None] + moving + calls * self.call[None, None, None]
        # No server waits for itself: what it computes is `own_bln`.
        itself_11nm = jnp.eye(len(self.round), dtype=bool)[None, None]
        wait_bln = _slowest(jnp.where(itself_11nm, 0.0, seconds), visits, tiny)
        return own_bln * (1 - any_bln) + any_bln * jnp.maximum(own_bln, wait_bln)


def _slowest(seconds: Array, visits: Array, tiny: float) -> Array:
    """Expected seconds of the slowest of those that are visited, given that any is: [...].

    Where none is by these probabilities, which a small sample can say, it may be any.

    Args:
        seconds: [..., m], of each one.
        visits: [..., m], its probability to be visited.
    """
    dimension = seconds.ndim - 1
    slowest, skipped = lax.sort((-seconds, 1 - visits), dimension=dimension, num_keys=1)
    first = jnp.ones_like(skipped[..., :1])
    before = jnp.concatenate([first, jnp.cumprod(skipped, -1)[..., :-1]], -1)
    chance = before * (1 - skipped)
    expected = (-slowest * chance).sum(-1) / jnp.maximum(chance.sum(-1), tiny)
    return jnp.where(chance.sum(-1) > tiny, expected, seconds.max(-1))


class LockStepTimes(NamedTuple):
    """See `cost.LockStepCost`."""

    #: float [n] each.
    weight: Array
    state: Array
    call: Array
    transfer: Array
    layer: Array

    def layers(self, flows: Flows) -> tuple[Array, Array]:
        """
        max over servers and directions of (hidden states x seconds of that link)
        + max over servers of (expert calls x seconds of a call / devices)
        + transfers x seconds of a transfer + the fixed part
        """
        sent = flows.sent * self.weight[None, None, :, None]
        ways_bln = jnp.maximum(sent.sum(-1), sent.sum(-2))
        calls_blm = jnp.einsum("blnm,n->blm", flows.calls, self.weight)
        active = jnp.maximum((self.weight > 0).sum(), 1).astype(self.weight.dtype)
        seconds = (
            (ways_bln * self.state[None, None]).max(-1)
            + (calls_blm * self.call[None, None]).max(-1)
            + self.transfer * sent.sum((-2, -1)) / active
            + self.layer
        )
        return seconds, jnp.zeros((seconds.shape[1], 0), seconds.dtype)

    def shared(self, load: Array) -> Array:
        """Nothing: each layer waits for its own."""
        return jnp.zeros(load.shape[:-1], load.dtype)
