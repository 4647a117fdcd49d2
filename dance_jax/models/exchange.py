"""The exchange of one MoE layer: hidden states to the servers that hold experts, sums back.

Every process compiles its own program of the one step, with its own token count and pool size;
what must agree is the sequence of messages between two processes (messages.py).

A server's first device is its gateway: only gateways use the slow links, so a token crosses a
link once per server it needs. Inside a server the devices gather their tokens, each computes the
experts it holds, and the sums are scattered back (topology.py).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.models.experts import Pool, expert_ffn
from dance_jax.models.layers import Routed
from dance_jax.models.messages import (
    NO_EXPERT,
    Exchanged,
    Outgoing,
    dispatch,
    from_lanes,
    give_back,
    pack_rows,
    to_lanes,
    unpack_rows,
)
from dance_jax.models.topology import (
    AXIS,
    Topology,
    gather_siblings,
    scatter_siblings,
    sum_at_gateway,
)
from dance_jax.placement.visit import choose_servers

#: Rows from one peer that decode usually brings.
FEW_ROWS = 16


class Tables(NamedTuple):
    """Where experts are, as arguments of the step. Per device, l MoE layers, e experts."""

    #: int32 [l, e], bit n set when server n holds the expert.
    holders: Array
    #: int32 [l, e], slot on this device, -1 when it is not here.
    slot_of: Array


class Exchange:
    """The MoE computation of one layer across servers, inside shard_map over AXIS."""

    def __init__(self, topology: Topology, pool: Pool, tables: Tables, active: Array):
        """`active`: bool [], this server has work."""
        self.topology = topology
        self.pool = pool
        self.tables = tables
        self.active = active

    def __call__(
        self,
        layer: Array,
        x_td: Array,
        expert_tk: Array,
        weight_tk: Array,
        valid_t: Array,
        credit: Array,
    ) -> tuple[Array, Exchanged]:
        """Weighted sums of routed experts for this device's tokens of MoE layer `layer`, int32 [].

        Args:
            x_td: [t, d] hidden states, in the wire's dtype.
            expert_tk: int32 [t, k]; weight_tk: float32 [t, k].
            valid_t: bool [t], False for padding, which is routed nowhere.
            credit: int32 [], `Exchanged.credit` of this layer's last step.

        Returns:
            float32 [t, d] and the layer's traffic.
        """
        topology = self.topology
        d = x_td.shape[1]
        k = expert_tk.shape[1]
        holders_e, slot_e = self.tables.holders[layer], self.tables.slot_of[layer]
        expert_tk = jnp.where(valid_t[:, None], expert_tk, NO_EXPERT)
        rows = gather_siblings(topology, pack_rows(x_td, expert_tk, weight_tk))
        x_gd, expert_gk, weight_gk = unpack_rows(rows, d, k, x_td.dtype)

        known_gk = expert_gk != NO_EXPERT
        holders_gk = holders_e[jnp.where(known_gk, expert_gk, 0)]
        here_gk = ((holders_gk >> topology.rank) & 1) == 1
        visit_gk = choose_servers(holders_gk, known_gk & ~here_gk, topology.num_servers)
        local_gk = jnp.where(known_gk & here_gk, expert_gk, NO_EXPERT)

        if topology.num_servers == 1:
            y_gd = self._ffn(x_gd, local_gk, weight_gk, slot_e)
            zero = jnp.int32(0)
            traffic = Exchanged(jnp.zeros((1, 1), jnp.int32), zero, zero, self.active)
            return scatter_siblings(topology, y_gd), traffic

        outgoing = {}
        for peer in topology.peers:
            expert_gk_peer = jnp.where(visit_gk == peer, expert_gk, NO_EXPERT)
            outgoing[peer] = Outgoing.select(
                pack_rows(x_gd, expert_gk_peer, weight_gk), expert_gk_peer
            )
        counts_n = jnp.stack(
            [
                outgoing[n].count if n in outgoing else jnp.int32(0)
                for n in range(topology.num_servers)
            ]
        )
        inbox, traffic, order = dispatch(topology, outgoing, counts_n, self.active, credit)

        # In decode the few rows that come must not cost what the room for a prefill's costs.
        received = {peer: traffic.rows[peer, topology.rank] for peer in topology.peers}
        own = Routed(x_gd, local_gk, weight_gk)
        run = functools.partial(self._run_experts, own, inbox, received, slot_e)
        few = traffic.rows.max() <= FEW_ROWS
        y_gd, sums = lax.cond(few, lambda: run(FEW_ROWS), lambda: run(None))
        replies = {
            peer: to_lanes(sum_at_gateway(topology, y_rd, received[peer]).astype(x_td.dtype))
            for peer, y_rd in sums.items()
        }
        returned = give_back(topology, replies, traffic.rows, order)
        is_gateway = lax.axis_index(AXIS) == topology.gateway(topology.rank)
        for peer in topology.peers:
            partial_gd = from_lanes(returned[peer], x_td.dtype)[outgoing[peer].position]
            arrived_g = outgoing[peer].chosen & is_gateway
            y_gd += jnp.where(arrived_g[:, None], partial_gd.astype(jnp.float32), 0.0)
        return scatter_siblings(topology, y_gd), traffic

    def _run_experts(
        self,
        own: Routed,
        inbox: dict[int, Array],
        received: dict[int, Array],
        slot_e: Array,
        limit: int | None,
    ) -> tuple[Array, dict[int, Array]]:
        """Sums of this device's experts for this server's tokens and for what peers sent.

        Args:
            own: tokens of this server, with the experts that are here.
            inbox: packed rows of each peer, of which the first `received` count.
            slot_e: int32 [e], `Tables.slot_of` of the layer.
            limit: no peer sent more rows; None: any number.

        Returns:
            float32 [g, d], and per peer float32 [its rows, d].
        """
        parts = [own]
        for peer, box in inbox.items():
            x, expert, weight = unpack_rows(
                box[:limit], own.x.shape[1], own.expert.shape[1], own.x.dtype
            )
            present = jnp.arange(x.shape[0])[:, None] < received[peer]
            parts.append(Routed(x, jnp.where(present, expert, NO_EXPERT), weight))
        rows = Routed(*(jnp.concatenate(column) for column in zip(*parts, strict=True)))
        y_gd, *y_peers = jnp.split(
            self._ffn(*rows, slot_e), np.cumsum([part.x.shape[0] for part in parts])[:-1]
        )
        return y_gd, {
            peer: jnp.pad(y, ((0, inbox[peer].shape[0] - y.shape[0]), (0, 0)))
            for peer, y in zip(inbox, y_peers, strict=True)
        }

    def _ffn(self, x_nd: Array, expert_nk: Array, weight_nk: Array, slot_e: Array) -> Array:
        known_nk = expert_nk != NO_EXPERT
        slot_nk = jnp.where(known_nk, slot_e[jnp.where(known_nk, expert_nk, 0)], -1)
        experts = self.pool.w_gate.shape[0] / self.tables.slot_of.shape[0]
        return expert_ffn(self.pool, x_nd, slot_nk, weight_nk, experts)
