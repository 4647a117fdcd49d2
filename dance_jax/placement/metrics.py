"""What a placement costs on given routes: remote, transfers, busiest, load, layer time.

Every server weighs equally, however many tokens its routes have; servers without tokens send
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
from dance_jax.placement.visit import choose_servers, masks


@dataclasses.dataclass(frozen=True, eq=False)
class Traffic:
    """Flows between servers on given routes, per token of the sending server."""

    #: float64 [layers, from, to]: hidden states a token of `from` sends to `to`; 0 to itself.
    transfers_lnn: np.ndarray
    #: float64 [layers, from, to]: expert calls of a token of `from` that `to` runs, itself too.
    calls_lnn: np.ndarray
    #: bool [servers]: servers that have tokens.
    active_n: np.ndarray

    @property
    def remote(self) -> float:
        """Share of expert calls that leave the server, mean over servers."""
        calls_nn = self.calls_lnn.sum(0)[self.active_n]
        local_n = self.calls_lnn.sum(0).diagonal()[self.active_n]
        return float(np.mean(1.0 - local_n / calls_nn.sum(1)))

    @property
    def transfers(self) -> float:
        """Remote servers a token visits per layer, mean over layers and servers."""
        return float(self.transfers_lnn.sum(2)[:, self.active_n].mean())

    @property
    def busiest(self) -> float:
        """Hidden states into or out of the busiest server per token of a server.

        Worst server and direction of each layer, mean over layers.
        """
        out_ln, into_ln = self.transfers_lnn.sum(2), self.transfers_lnn.sum(1)
        return float(np.maximum(out_ln, into_ln).max(1).mean())

    def load(self, devices: Sequence[int] | np.ndarray | None = None) -> float:
        """Largest share of a layer's expert calls on one device, mean over layers.

        A server's calls are divided evenly by its devices (int [servers], default one each).
        """
        total_ln1 = self.calls_lnn.sum(2, keepdims=True)
        share_lnn = self.calls_lnn / np.where(total_ln1 > 0, total_ln1, 1) / self.active_n.sum()
        num_servers = len(self.active_n)
        devices_n = np.ones(num_servers) if devices is None else np.asarray(devices, float)
        if devices_n.shape != (num_servers,) or (devices_n < 1).any():
            raise UserError(f"devices: {num_servers} numbers of at least 1 are needed")
        return float((share_lnn.sum(1) / devices_n[None, :]).max(1).mean())

    def layer_time(self, cost: Cost, weights: Sequence[float] | np.ndarray | None = None) -> float:
        """Seconds that a layer in lock step takes per token of a server, mean over layers.

        Per layer max over servers and directions of (hidden states x seconds of that link)
        + max over servers of (expert calls x seconds of a call / devices)
        + transfers x seconds of a transfer + the fixed part.

        Args:
            cost: seconds of each part.
            weights: float [servers], tokens of each server per token of the mean server;
                default: equal.

        Raises:
            UserError: cost or weights are of another number of servers.
        """
        num_servers = len(self.active_n)
        weight_n = np.ones(num_servers) if weights is None else np.asarray(weights)
        if len(cost.state) != num_servers or weight_n.shape != (num_servers,):
            raise UserError(
                f"layer time: cost of {len(cost.state)} servers and weights {weight_n.shape} "
                f"for {num_servers}"
            )
        weight_n = weight_n * self.active_n
        flow_lnn = self.transfers_lnn * weight_n[None, :, None]
        calls_ln = (self.calls_lnn * weight_n[None, :, None]).sum(1)
        ways_ln = np.maximum(flow_lnn.sum(2), flow_lnn.sum(1))
        busiest_l = (ways_ln * cost.state).max(1)
        compute_l = (calls_ln * (cost.call / cost.devices)).max(1)
        transfers_l = flow_lnn.sum((1, 2)) / self.active_n.sum()
        return float((busiest_l + compute_l + cost.transfer * transfers_l).mean() + cost.layer)

    def concentration(self, weights: Sequence[float] | np.ndarray | None = None) -> float:
        """Hidden states through the busiest link direction of each layer over all hidden states.

        Of layers in which all servers have tokens, as many as `weights` says; 1: none is sent.
        """
        weight_n = np.ones(len(self.active_n)) if weights is None else np.asarray(weights)
        flow_lnn = self.transfers_lnn * (weight_n * self.active_n)[None, :, None]
        total = flow_lnn.sum()
        busiest_l = np.maximum(flow_lnn.sum(2), flow_lnn.sum(1)).max(1)
        return float(busiest_l.sum() / total) if total > 0 else 1.0


@functools.partial(jax.jit, static_argnames="num_servers")
def _flows(
    holders_wle: jax.Array,
    held_le: jax.Array,
    server: jax.Array,
    routes_tlk: jax.Array,
    num_servers: int,
) -> tuple[jax.Array, jax.Array]:
    """What a server's tokens send: transfers and calls to each server, int32 [l, n] both.

    Args:
        holders_wle: `masks` of who holds each expert; held_le: bool, what the server itself holds.
        routes_tlk: its tokens'; negative: no token.
    """
    tokens, layers, k = routes_tlk.shape
    layer_1l1 = jnp.arange(layers, dtype=jnp.int32)[None, :, None]
    valid, expert_tlk = routes_tlk >= 0, jnp.maximum(routes_tlk, 0)
    needed = valid & ~held_le[layer_1l1, expert_tlk]
    holders = holders_wle[:, layer_1l1, expert_tlk].reshape(len(holders_wle), -1, k)
    chosen = choose_servers(holders, needed.reshape(-1, k), num_servers)
    chosen = chosen.reshape(tokens, layers, k)
    server_n = jnp.arange(num_servers, dtype=jnp.int32)
    served = jnp.where(valid & ~needed, server, chosen)[..., None] == server_n[None, None, None, :]
    calls_ln = served.sum(axis=(0, 2), dtype=jnp.int32)
    visits = (chosen[..., None] == server_n[None, None, None, :]).any(axis=2)
    return visits.sum(axis=0, dtype=jnp.int32), calls_ln


def measure(resident_nle: np.ndarray, routes: Sequence[np.ndarray]) -> Traffic:
    """Counts where the experts of every token run under a placement.

    Args:
        resident_nle: bool [servers, layers, experts].
        routes: per server an int array [tokens, layers, k] of chosen experts.

    Raises:
        UserError: shapes disagree, an expert number is out of range, or there is no token at all.
    """
    num_servers, layers, experts = resident_nle.shape
    if len(routes) != num_servers:
        raise UserError(f"routes of {len(routes)} servers, the placement has {num_servers}")
    holders_wle = jnp.asarray(masks(resident_nle))
    transfers_lnn = np.zeros((layers, num_servers, num_servers))
    calls_lnn = np.zeros_like(transfers_lnn)
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
        transfers_ln, calls_ln = _flows(
            holders_wle,
            jnp.asarray(resident_nle[n]),
            jnp.int32(n),
            jnp.asarray(padded),
            num_servers,
        )
        transfers_lnn[:, n] = np.asarray(transfers_ln) / len(route)
        calls_lnn[:, n] = np.asarray(calls_ln) / len(route)
    return Traffic(transfers_lnn, calls_lnn, active_n)
