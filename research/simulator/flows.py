"""Where the calls of every token go, computed once, so that a step only has to count keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from dance_jax.placement.core import Placement
from dance_jax.placement.devices import device_slots
from dance_jax.placement.visit import choose_servers, masks
from research.simulator.batches import Sequence
from research.simulator.scenario import Messages, Scenario

#: Tokens of one look-up of visited servers: bounds the memory, and one shape is compiled.
CHUNK = 256


def servers_of(scenario: Scenario, server: int) -> np.ndarray:
    """The server that runs each call of a server's tokens: int64 [t, l, k].

    Resident experts run at home. Other calls go where the engine sends them (`choose_servers`) if
    messages are per server, and to a random holder if they are per expert.
    """
    placement, route_tlk = scenario.placement, scenario.routes[server]
    layer_l1 = np.arange(route_tlk.shape[1])[:, None]
    here_tlk = placement.resident[server][layer_l1, route_tlk]
    if scenario.messages == "server":
        away_tlk = _visited(placement, route_tlk, ~here_tlk, scenario.order[server])
    else:
        holders_le = placement.resident.sum(0)
        # Holders first, in the order of their numbers.
        holder_nle = np.argsort(~placement.resident, axis=0, kind="stable")
        rng = np.random.default_rng((scenario.seed, server))
        count_tlk = holders_le[layer_l1, route_tlk]
        pick_tlk = (rng.random(route_tlk.shape) * count_tlk).astype(np.int64)
        away_tlk = holder_nle[pick_tlk, layer_l1, route_tlk]
    return np.where(here_tlk, server, away_tlk)


def _visited(
    placement: Placement, route_tlk: np.ndarray, away_tlk: np.ndarray, order_n: np.ndarray
) -> np.ndarray:
    """`choose_servers` of many tokens, in chunks: int64 [t, l, k], arbitrary where not away."""
    tokens, layers, k = route_tlk.shape
    holders_wtlk = masks(placement.resident, order_n)[:, np.arange(layers)[:, None], route_tlk]
    out = np.empty((tokens * layers, k), np.int64)
    holders, away = holders_wtlk.reshape(len(holders_wtlk), -1, k), away_tlk.reshape(-1, k)
    size = CHUNK * layers
    for begin in range(0, len(out), size):
        part = slice(begin, begin + size)
        missing = size - len(out[part])
        chosen = _choose(
            jnp.asarray(np.pad(holders[:, part], ((0, 0), (0, missing), (0, 0)))),
            jnp.asarray(np.pad(away[part], ((0, missing), (0, 0)))),
            placement.num_servers,
        )
        out[part] = np.asarray(chosen)[: size - missing]
    return order_n[out].reshape(route_tlk.shape)


_choose = jax.jit(choose_servers, static_argnums=2)


def sent(server_tlk: np.ndarray, server: int, messages: Messages) -> np.ndarray:
    """The calls with which a row goes to another server: bool [t, l, k].

    With messages per server, a row goes with the first of a token's calls to that server.
    """
    remote_tlk = server_tlk != server
    if messages == "expert":
        return remote_tlk
    for j in range(1, server_tlk.shape[2]):
        again = (server_tlk[..., j : j + 1] == server_tlk[..., :j]).any(-1)
        remote_tlk[..., j] &= ~again
    return remote_tlk


@dataclasses.dataclass(frozen=True, eq=False)
class Flows:
    """Keys of every token of all routes, one server's tokens after another's.

    Counting keys counts rows and calls: `np.bincount(flows.rows[tokens].ravel())`.
    """

    #: int64 [t, l * k]: (from, layer, to) of a row as one number; to == from if none is sent.
    rows: np.ndarray
    #: int64 [t, l * k]: (layer, server that runs the call, expert) as one number.
    calls: np.ndarray
    #: int64 [layers * servers * experts]: for each key of `calls`, (layer, device) as one number.
    #: Devices are counted through all servers.
    device: np.ndarray
    #: int64 [requests]: where the routes of the request's server begin in the arrays, how many
    #: there are, and with which of them the request begins.
    begin: np.ndarray
    length: np.ndarray
    offset: np.ndarray

    @classmethod
    def of(cls, scenario: Scenario) -> Flows:
        """Computes all keys."""
        placement, routes = scenario.placement, scenario.routes
        num, layers, experts = placement.resident.shape
        layer_l1 = np.arange(layers)[:, None]
        rows, calls = [], []
        for n, route_tlk in enumerate(routes):
            server_tlk = servers_of(scenario, n)
            goes_tlk = sent(server_tlk, n, scenario.messages)
            to_tlk = np.where(goes_tlk, server_tlk, n)
            rows.append(((n * layers + layer_l1) * num + to_tlk).reshape(len(route_tlk), -1))
            key_tlk = (layer_l1 * num + server_tlk) * experts + route_tlk
            calls.append(key_tlk.reshape(len(route_tlk), -1))
        lengths = np.array([len(route) for route in routes])
        begins = np.cumsum(lengths) - lengths
        server_r = scenario.requests.server
        return cls(
            rows=np.concatenate(rows),
            calls=np.concatenate(calls),
            device=_device_keys(scenario),
            begin=begins[server_r],
            length=lengths[server_r],
            offset=np.random.default_rng(scenario.seed).integers(lengths[server_r]),
        )

    def tokens(self, work: Iterable[tuple[Sequence, int]]) -> np.ndarray:
        """Indices into the arrays of the next `count` tokens of each sequence: int64 [tokens]."""
        single, several = [], []
        for sequence, count in work:
            if count == 1:
                r = sequence.request
                single.append(self.begin[r] + (self.offset[r] + sequence.computed) % self.length[r])
            else:
                several.append(self.places(sequence, 0, count))
        return np.concatenate([np.array(single, np.int64), *several])

    def places(self, sequence: Sequence, skipped: int, count: int) -> np.ndarray:
        """Indices of the `count` tokens of one sequence that follow the `skipped` next ones."""
        r = sequence.request
        first = self.offset[r] + sequence.computed + skipped
        return self.begin[r] + np.arange(first, first + count) % self.length[r]


def _device_keys(scenario: Scenario) -> np.ndarray:
    devices = np.array(scenario.devices)
    slots = [server.slots for server in scenario.servers]
    device_nle, _ = device_slots(scenario.placement, devices, slots, scenario.counts)
    first_n = np.cumsum(devices) - devices
    # Experts that are not resident are never called.
    global_nle = np.maximum(device_nle, 0) + first_n[:, None, None]
    layer_l11 = np.arange(device_nle.shape[1])[:, None, None]
    return (layer_l11 * devices.sum() + global_nle.transpose(1, 0, 2)).ravel()
