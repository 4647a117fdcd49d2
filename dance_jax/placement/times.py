"""The predicted time of a layer from what its tokens send and call: formulas of `cost`, for jit.

Where servers step on their own (`CallTimes`), a layer takes a step of r rows of server n

    (1 - any) x own + any x max(own, wait)

Here `any` = 1 - (1 - away)^r is the probability that any row misses an expert, `own` the seconds of
the expert calls at home, which are computed while other calls are out, and `wait` the seconds of
the slowest server that is called: the round trip, the bytes, and the expert calls that it computes.
On the caller's own link the bytes to all servers count. Server m is called with probability
1 - (1 - sent[m])^r, as if rows and servers were independent. Queueing behind the calls of others is
added for all layers together (`shared`), because servers are in different layers at the same time.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array, lax

from dance_jax.placement.flows import Flows


class Times(Protocol):
    """Predicted seconds per token of a server."""

    def layers(self, flows: Flows) -> tuple[Array, Array]:
        """The time of each layer alone, and the load that it adds to what layers share.

        Returns:
            float [b, l]: seconds of each layer, as if it had links and devices for itself.
            float [l, x]: its part of the load of `shared`.
        """
        ...

    def shared(self, load: Array) -> Array:
        """Seconds that all layers together wait for each other, float [...].

        Args:
            load: [..., x], the sum over all layers.
        """
        ...


class CallTimes(NamedTuple):
    """Times of servers that step on their own; see `cost.CallCost`, and above."""

    #: float [n] each.
    weight: Array
    state: Array
    call: Array
    round: Array
    #: float [r] each: numbers of rows, and the fraction of steps that have so many.
    rows: Array
    steps: Array
    busy: Array

    def layers(self, flows: Flows) -> tuple[Array, Array]:
        call_11n, state_11n = self.call[None, None], self.state[None, None]
        own_bln = jnp.diagonal(flows.calls, axis1=-2, axis2=-1) * call_11n
        seconds_bln = jnp.zeros_like(own_bln)
        for rows, steps in zip(self.rows, self.steps, strict=True):
            seconds_bln = seconds_bln + steps * self._step(flows, own_bln * rows, rows)
        rows_per_step = (self.rows * self.steps).sum()
        seconds_bl = seconds_bln @ self.weight / (rows_per_step * _active(self.weight))
        calls_blm = jnp.einsum("blnm,n->blm", flows.calls, self.weight)
        out_bln = flows.sent.sum(-1) * self.weight[None, None]
        ways_bln = out_bln + jnp.einsum("blnm,n->blm", flows.sent, self.weight)
        load = jnp.concatenate([calls_blm * call_11n, ways_bln * state_11n / 2], -1)
        return seconds_bl, load.mean(0)

    def shared(self, load: Array) -> Array:
        """Seconds that calls queue behind the calls of others.

        A call to a server that is busy for a fraction p of the time finds others before it with
        probability p. `busy` is the mean p of all servers; the p of each is in proportion to its
        load.
        """
        load = load.reshape(*load.shape[:-1], 2, len(self.weight))
        mean = jnp.maximum(load.mean(-1), jnp.finfo(load.dtype).tiny)
        return self.busy * ((load**2).sum(-1) / mean).sum(-1) / _active(self.weight)

    def _step(self, flows: Flows, own_bln: Array, rows: Array) -> Array:
        """Seconds of a layer in a step of `rows` rows of each server: [b, l, n]."""
        tiny = float(jnp.finfo(own_bln.dtype).eps)
        any_bln = 1 - (1 - jnp.minimum(flows.away, 1)) ** rows
        visits = 1 - (1 - jnp.minimum(flows.sent, 1)) ** rows
        # States and calls of a server, given that it is called at all.
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


def _active(weight: Array) -> Array:
    """The number of servers with tokens, as a float."""
    return jnp.maximum((weight > 0).sum(), 1).astype(weight.dtype)


def _slowest(seconds: Array, visits: Array, tiny: float) -> Array:
    """Expected seconds of the slowest server that is visited, given that any is: [...].

    Where a small sample gives every server the probability 0, the slowest of all counts.

    Args:
        seconds: [..., m], of each server.
        visits: [..., m], the probability that it is visited.
    """
    dimension = seconds.ndim - 1
    slowest, skipped = lax.sort((-seconds, 1 - visits), dimension=dimension, num_keys=1)
    first = jnp.ones_like(skipped[..., :1])
    before = jnp.concatenate([first, jnp.cumprod(skipped, -1)[..., :-1]], -1)
    chance = before * (1 - skipped)
    expected = (-slowest * chance).sum(-1) / jnp.maximum(chance.sum(-1), tiny)
    return jnp.where(chance.sum(-1) > tiny, expected, seconds.max(-1))


class LockStepTimes(NamedTuple):
    """Times of servers that step together; see `cost.LockStepCost`."""

    #: float [n] each.
    weight: Array
    state: Array
    call: Array
    #: float [].
    transfer: Array

    def layers(self, flows: Flows) -> tuple[Array, Array]:
        """Seconds of each layer, which all servers do together:

        max over servers and directions of (hidden states x seconds of that link)
        + max over servers of (expert calls x seconds of a call / devices)
        + transfers x seconds of a transfer
        """
        sent = flows.sent * self.weight[None, None, :, None]
        ways_bln = jnp.maximum(sent.sum(-1), sent.sum(-2))
        calls_blm = jnp.einsum("blnm,n->blm", flows.calls, self.weight)
        seconds = (
            (ways_bln * self.state[None, None]).max(-1)
            + (calls_blm * self.call[None, None]).max(-1)
            + self.transfer * sent.sum((-2, -1)) / _active(self.weight)
        )
        return seconds, jnp.zeros((seconds.shape[1], 0), seconds.dtype)

    def shared(self, load: Array) -> Array:
        """Zero: layers come one after another, and none waits for another's links or devices."""
        return jnp.zeros(load.shape[:-1], load.dtype)
