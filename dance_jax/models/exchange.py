"""The exchange of one MoE layer: hidden states to the servers that hold experts, sums back.

Every process compiles its own program of the one step, with its own token count and pool size;
what must agree is the sequence of messages between two processes, which a transport carries
(messages.py).

A server's first device is its gateway: only gateways use the slow links, so a token crosses a
link once per server it needs. Inside a server the devices gather their tokens, each computes the
experts it holds, and the sums are scattered back (topology.py).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.models.experts import ExpertFormat, Pool
from dance_jax.models.messages import (
    NO_EXPERT,
    Columns,
    Exchanged,
    Incoming,
    Outgoing,
    Transport,
    agree,
    decode,
    encode,
    join_columns,
    split_columns,
)
from dance_jax.models.router import Routed
from dance_jax.models.topology import (
    Topology,
    gather_siblings,
    local_index,
    scatter_siblings,
    sum_at_gateway,
)
from dance_jax.placement.visit import choose_servers

#: Rows from all peers for which experts are compiled, beside the most there can be: few rows must
#: not cost what the room for a prefill's costs.
LIMITS = (16, 128)


class Tables(NamedTuple):
    """Where experts are, as arguments of the step. Per device, l MoE layers, e experts."""

    #: int32 [l, e], bit n set when server n holds the expert.
    holders: Array
    #: int32 [l, e], slot on this device, -1 when it is not here.
    slot_of: Array


class Exchange:
    """The MoE computation of one layer across servers, inside shard_map over AXIS."""

    def __init__(
        self,
        topology: Topology,
        form: ExpertFormat,
        pool: Pool,
        tables: Tables,
        said: Array,
        transport: Transport,
        wire_dtype: np.dtype,
    ):
        """
        Args:
            form: what the pool's slots hold.
            said: int32 [], what this server tells the others of itself (`messages.say`); all learn
                what follows from all (`messages.agree`).
            wire_dtype: of hidden states and sums between servers, see messages.encode.
        """
        self.topology = topology
        self.form = form
        self.pool = pool
        self.tables = tables
        self.said = said
        self.transport = transport
        self.wire_dtype = wire_dtype

    def __call__(
        self,
        layer: Array,
        x_td: Array,
        expert_tk: Array,
        weight_tk: Array,
        valid_t: Array,
        memory: Any,
    ) -> tuple[Array, Exchanged]:
        """Weighted sums of routed experts for this device's tokens of MoE layer `layer`, int32 [].

        Args:
            x_td: [t, d] hidden states.
            expert_tk: int32 [t, k]; weight_tk: float32 [t, k].
            valid_t: bool [t], False for padding, which is routed nowhere.
            memory: `Exchanged.memory` of this layer's last step.

        Returns:
            float32 [t, d] and the layer's traffic.
        """
        topology, servers = self.topology, self.topology.num_servers
        holders_e, slot_e = self.tables.holders[layer], self.tables.slot_of[layer]
        expert_tk = jnp.where(valid_t[:, None], expert_tk, NO_EXPERT)
        x_gd, expert_gk, weight_gk = self._gather(Routed(x_td, expert_tk, weight_tk))

        known_gk = expert_gk != NO_EXPERT
        holders_gk = holders_e[jnp.where(known_gk, expert_gk, 0)]
        here_gk = ((holders_gk >> topology.rank) & 1) == 1
        visit_gk = choose_servers(holders_gk, known_gk & ~here_gk, servers)
        own = Routed(x_gd, jnp.where(here_gk, expert_gk, NO_EXPERT), weight_gk)

        if servers == 1:
            none = jnp.zeros((1, 1), jnp.int32)
            exchanged = Exchanged(none, none, *agree(self.said[None]), memory)
            return scatter_siblings(topology, self._ffn(*own, slot_e)), exchanged

        visit_ngk = visit_gk == jnp.arange(servers)[:, None, None]
        outgoing = Outgoing(
            goes=visit_ngk.any(-1),
            expert=jnp.where(visit_ngk, expert_gk, NO_EXPERT).astype(jnp.uint16),
            weight=weight_gk,
            hidden=encode(x_gd, self.wire_dtype),
        )
        incoming, exchanged = self.transport.dispatch(topology, outgoing, self.said, memory)
        y_gd, sums = self._run_experts(
            own, incoming, exchanged.rows[:, topology.rank].sum(), slot_e
        )
        returned = self.transport.give_back(topology, sums, outgoing.goes, exchanged.rows)
        for peer in topology.peers:
            sum_gd = decode(tuple(column[peer] for column in returned), jnp.dtype(jnp.float32))
            arrived_g = outgoing.goes[peer] & (local_index(topology) == 0)
            y_gd += jnp.where(arrived_g[:, None], sum_gd, 0.0)
        return scatter_siblings(topology, y_gd), exchanged

    def _gather(self, own: Routed) -> Routed:
        """The tokens of all devices of this server; expert numbers become uint16."""
        columns = (own.x, own.expert.astype(jnp.uint16), own.weight)
        if self.topology.siblings > 1:
            rows = gather_siblings(self.topology, join_columns(columns))
            columns = split_columns(rows, columns)
        x_gd, expert_gk, weight_gk = columns
        return Routed(x_gd, expert_gk.astype(jnp.int32), weight_gk)

    def _run_experts(
        self, own: Routed, incoming: Incoming, received: Array, slot_e: Array
    ) -> tuple[Array, Columns]:
        """Sums of this server's experts for its own tokens and for what peers sent.

        Args:
            own: tokens of this server, with the experts that are here.
            incoming: peers' rows, of which the first `received`, int32 [], count.
            slot_e: int32 [e], `Tables.slot_of` of the layer.

        Returns:
            float32 [g, d], this device's experts alone; and per row of `incoming` the sum to give
            back, encoded, right on the gateway.
        """
        room = incoming.expert.shape[0]

        def run(limit: int) -> tuple[Array, Columns]:
            expert, weight, hidden = jax.tree.map(lambda column: column[:limit], incoming)
            present = jnp.arange(limit)[:, None] < received
            expert = jnp.where(present, expert, NO_EXPERT).astype(jnp.int32)
            theirs = Routed(decode(hidden, own.x.dtype), expert, weight)
            rows = Routed(*(jnp.concatenate(parts) for parts in zip(own, theirs, strict=True)))
            y_gd, y_rd = jnp.split(self._ffn(*rows, slot_e), [own.x.shape[0]])
            sums = encode(sum_at_gateway(self.topology, y_rd, received), self.wire_dtype)
            return y_gd, tuple(jnp.pad(column, ((0, room - limit), (0, 0))) for column in sums)

        limits = [*(limit for limit in LIMITS if limit < room), room]
        branch = jnp.sum(jnp.array(limits[:-1], jnp.int32) < received, dtype=jnp.int32)
        return lax.switch(branch, [functools.partial(run, limit) for limit in limits])

    def _ffn(self, x_nd: Array, expert_nk: Array, weight_nk: Array, slot_e: Array) -> Array:
        known_nk = expert_nk != NO_EXPERT
        slot_nk = jnp.where(known_nk, slot_e[jnp.where(known_nk, expert_nk, 0)], -1)
        layers = self.tables.slot_of.shape[0]
        return self.form.ffn(self.pool, x_nd, slot_nk, weight_nk, layers)
