"""Measures of a placement on given routes: remote, any-miss, transfers, busiest, load, layer time.

All servers weigh the same, however many tokens their routes have. Servers without tokens send
nothing and are left out of the means.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dance_jax.config import UserError
from dance_jax.placement.cost import Cost
from dance_jax.placement.flows import Flows
from dance_jax.placement.times import Times
from dance_jax.placement.visit import choose_servers, masks, preferences


@dataclasses.dataclass(frozen=True, eq=False)
class Traffic:
    """Flows between servers on given routes, per token of the sending server."""

    #: float64 [layers, from, to]: hidden states that a token of `from` sends to `to`; 0 to itself.
    transfers_lnn: np.ndarray
    #: float64 [layers, from, to]: expert calls of a token of `from` that `to` computes; `to` may be
    #: `from`.
    calls_lnn: np.ndarray
    #: float64 [layers, servers]: share of a server's tokens that miss any expert.
    away_ln: np.ndarray
    #: bool [servers]: servers with tokens.
    active_n: np.ndarray

    @property
    def remote(self) -> float:
        """Share of expert calls that leave the server, mean over servers."""
        calls_nn = self.calls_lnn.sum(0)[self.active_n]
        local_n = self.calls_lnn.sum(0).diagonal()[self.active_n]
        return float(np.mean(1.0 - local_n / calls_nn.sum(1)))

    @property
    def any_miss(self) -> float:
        """Share of (token, layer) with any call that leaves the server, mean over servers."""
        return float(self.away_ln[:, self.active_n].mean())

    @property
    def transfers(self) -> float:
        """Remote servers that a token visits per layer, mean over layers and servers."""
        return float(self.transfers_lnn.sum(2)[:, self.active_n].mean())

    @property
    def busiest(self) -> float:
        """Hidden states into or out of the busiest server, per token of a server.

        The worst server and direction of each layer, mean over layers.
        """
        out_ln, into_ln = self.transfers_lnn.sum(2), self.transfers_lnn.sum(1)
        return float(np.maximum(out_ln, into_ln).max(1).mean())

    def load(self, devices: Sequence[int] | np.ndarray | None = None) -> float:
        """Largest share of a layer's expert calls on one device, mean over layers.

        A server's calls are divided evenly by its devices (int [servers], default one each).
        """
        return float(self._device_shares(self.calls_lnn, devices).max(1).mean())

    def device(self, devices: Sequence[int] | np.ndarray | None = None) -> float:
        """Largest share of all layers' expert calls on one device; see `load`."""
        return float(self._device_shares(self.calls_lnn.sum(0)[None], devices).max())

    def _device_shares(
        self, calls_lnn: np.ndarray, devices: Sequence[int] | np.ndarray | None
    ) -> np.ndarray:
        """The share of a layer's calls on each device of each server: float64 [l, n]."""
        total_ln1 = calls_lnn.sum(2, keepdims=True)
        share_lnn = calls_lnn / np.where(total_ln1 > 0, total_ln1, 1) / self.active_n.sum()
        num_servers = len(self.active_n)
        devices_n = np.ones(num_servers) if devices is None else np.asarray(devices, float)
        if devices_n.shape != (num_servers,) or (devices_n < 1).any():
            raise UserError(f"devices: {num_servers} numbers of at least 1 are needed")
        return share_lnn.sum(1) / devices_n[None, :]

    def layer_time(self, cost: Cost, weights: Sequence[float] | np.ndarray | None = None) -> float:
        """Predicted seconds of a layer per token of a server, mean over layers; see `times`.

        Args:
            cost: the cost of the exchange in use.
            weights: float [servers], tokens of each server per token of the mean server;
                default: equal.

        Raises:
            UserError: cost or weights are of another number of servers.
        """
        num_servers = len(self.active_n)
        weight_n = np.ones(num_servers) if weights is None else np.asarray(weights, float)
        if cost.servers != num_servers or weight_n.shape != (num_servers,):
            raise UserError(
                f"layer time: cost of {cost.servers} servers and weights {weight_n.shape} "
                f"for {num_servers}"
            )
        with jax.enable_x64(True):
            flows = Flows(
                away=jnp.asarray(self.away_ln[None]),
                sent=jnp.asarray(self.transfers_lnn[None]),
                calls=jnp.asarray(self.calls_lnn[None]),
            )
            return float(_layer_time(cost.times(weight_n * self.active_n, np.float64), flows))

    def concentration(self, weights: Sequence[float] | np.ndarray | None = None) -> float:
        """Hidden states through the busiest link direction of each layer over all hidden states.

        All servers have tokens at the same time, in proportion to `weights`. 1 if nothing is sent.
        """
        weight_n = np.ones(len(self.active_n)) if weights is None else np.asarray(weights)
        flow_lnn = self.transfers_lnn * (weight_n * self.active_n)[None, :, None]
        total = flow_lnn.sum()
        busiest_l = np.maximum(flow_lnn.sum(2), flow_lnn.sum(1)).max(1)
        return float(busiest_l.sum() / total) if total > 0 else 1.0


@jax.jit
def _layer_time(times: Times, flows: Flows) -> jax.Array:
    seconds_bl, load_lx = times.layers(flows)
    return seconds_bl.mean() + times.shared(load_lx.sum(0)) / len(load_lx)


@functools.partial(jax.jit, static_argnames="num_servers")
def _counts(
    holders_wle: jax.Array, held_le: jax.Array, routes_tlk: jax.Array, num_servers: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a server's tokens send, by place in the server's order of preference.

    Args:
        holders_wle: `masks` of who holds each expert, in that order.
        held_le: bool, what the server itself holds.
        routes_tlk: routes of its tokens; negative numbers pad.

    Returns:
        int32: tokens that miss any expert [l], tokens that visit each place [l, n], and expert
        calls that are computed there [l, n].
    """
    tokens, layers, k = routes_tlk.shape
    layer_1l1 = jnp.arange(layers, dtype=jnp.int32)[None, :, None]
    valid, expert_tlk = routes_tlk >= 0, jnp.maximum(routes_tlk, 0)
    needed = valid & ~held_le[layer_1l1, expert_tlk]
    holders = holders_wle[:, layer_1l1, expert_tlk].reshape(len(holders_wle), -1, k)
    chosen = choose_servers(holders, needed.reshape(-1, k), num_servers)
    place_111m = jnp.arange(num_servers, dtype=jnp.int32)[None, None, None, :]
    served = chosen.reshape(tokens, layers, k, 1) == place_111m
    visits = served.any(axis=2)
    away_l = needed.any(axis=2).sum(axis=0, dtype=jnp.int32)
    return away_l, visits.sum(axis=0, dtype=jnp.int32), served.sum(axis=(0, 2), dtype=jnp.int32)


def measure(
    resident_nle: np.ndarray, routes: Sequence[np.ndarray], order: np.ndarray | None = None
) -> Traffic:
    """Counts where the experts of every token run under a placement.

    Args:
        resident_nle: bool [servers, layers, experts].
        routes: per server int [tokens, layers, k], the chosen experts.
        order: int [servers, servers], see `visit.preferences`; None: all servers are equal.

    Raises:
        UserError: shapes disagree, an expert number is out of range, or there is no token at all.
    """
    num_servers, layers, experts = resident_nle.shape
    if len(routes) != num_servers:
        raise UserError(f"routes of {len(routes)} servers, the placement has {num_servers}")
    if order is None:
        order = preferences(np.ones((num_servers, num_servers)))
    if order.shape != (num_servers, num_servers):
        raise UserError(f"order of calls: {order.shape} for {num_servers} servers")
    transfers_lnn = np.zeros((layers, num_servers, num_servers))
    calls_lnn = np.zeros_like(transfers_lnn)
    away_ln = np.zeros((layers, num_servers))
    active_n = np.array([len(route) > 0 for route in routes])
    if not active_n.any():
        raise UserError("routes: no server has a token")
    for n, route in enumerate(routes):
        if not active_n[n]:
            continue
        if route.ndim != 3 or route.shape[1] != layers:
            raise UserError(
                f"routes of server {n} have shape {route.shape}; "
                f"[tokens, {layers} layers, k] is needed"
            )
        if route.min() < 0 or route.max() >= experts:
            raise UserError(f"routes of server {n}: expert numbers are 0..{experts - 1}")
        # Powers of two bound the number of compiled shapes.
        padded = np.full((1 << (len(route) - 1).bit_length(), *route.shape[1:]), -1, np.int32)
        padded[: len(route)] = route
        holders = masks(resident_nle, order[n])
        counts = _counts(
            jnp.asarray(holders), jnp.asarray(resident_nle[n]), jnp.asarray(padded), num_servers
        )
        away_l, visits_lm, served_lm = map(np.asarray, counts)
        away_ln[:, n] = away_l / len(route)
        transfers_lnn[:, n, order[n]] = visits_lm / len(route)
        calls_lnn[:, n, order[n]] = served_lm / len(route)
        calls_lnn[:, n, n] = (route[:, 0].size - served_lm.sum(1)) / len(route)
    return Traffic(transfers_lnn, calls_lnn, away_ln, active_n)
