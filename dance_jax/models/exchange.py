"""The routed experts of one MoE layer, wherever they are: an `Exchange` computes them.

`Calls`: each server steps on its own, and the C++ library asks other servers for what is missing
(calls.py). `HostCalls`: the same, but the host does it between two parts of the step
(host_calls.py). `LockStep`: all servers do each step together. Every process then compiles its own
program of it, with its own token count and pool size; what must agree is the sequence of messages
between two processes, which a transport carries (messages.py). A server's first device is its
gateway: only gateways use the slow links, so a token crosses a link once per server it needs.
Inside a server the devices gather their tokens, each computes the experts it holds, and the sums
are scattered back (topology.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.config import check_together
from dance_jax.models import calls
from dance_jax.models.experts import ExpertFormat, Pool
from dance_jax.models.messages import (
    NO_EXPERT,
    Exchanged,
    Incoming,
    Outgoing,
    Transport,
    agree,
    decode,
    encode,
    join_columns,
    rounded,
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
from dance_jax.placement.visit import choose_servers, has

#: Rows from all peers for which experts are compiled, beside the most there can be: few rows must
#: not cost what the room for a prefill's costs.
LIMITS = (16, 128)


class Tables(NamedTuple):
    """Where experts are, as arguments of the step. Per device, l MoE layers, e experts."""

    #: `visit.masks` [words, l, e] of the servers that hold each expert, in the order in which this
    #: server prefers to call them.
    holders: Array
    #: int32 [l, e], slot on this device, -1 when it is not here.
    slot_of: Array
    #: int32 [n], each server's place in that order.
    place: Array


class Experts(NamedTuple):
    """What a layer with routed experts gets beside its tokens: where experts are."""

    #: int32 []: which of the layers with routed experts it is.
    layer: Array
    #: Of this device; or int32 [], of `calls.CallServer.callers`.
    pool: Pool
    #: None where the C++ library knows.
    tables: Tables | None


class Group(NamedTuple):
    """Tokens of a device, all of a layer's or some, whose routed experts are asked for together."""

    #: Hidden states [t, d], experts int32 [t, k] and their weights float32 [t, k].
    routed: Routed
    #: bool [t], False for tokens that are routed nowhere.
    valid: Array
    #: Tokens in the groups before it.
    first: int


class Exchange(Protocol):
    """How a layer's routed experts are computed, wherever they are."""

    @property
    def name(self) -> str:
        """Compiled steps depend on it."""
        ...

    @property
    def servers(self) -> int:
        """Servers that take part in every step."""
        ...

    def memory(self, layers: int) -> Any:
        """`Exchanged.memory` before the first step: numpy arrays with a leading axis of layers."""
        ...


class TracedExchange(Exchange, Protocol):
    """Does so as part of a layer, inside shard_map over AXIS."""

    @property
    def groups(self) -> int:
        """Groups of a long slice's rows that a layer computes in turn."""
        ...

    def send(self, experts: Experts, group: Group, then: Array) -> Array:
        """Asks other servers, where it need not wait for them, for a group's routed experts.

        Args:
            then: what is to be computed after that.

        Returns:
            `then`.
        """
        ...

    def receive(
        self, experts: Experts, group: Group, behind: Array, status: Array, memory: Any
    ) -> tuple[Array, Array, Exchanged]:
        """Weighted sums of routed experts for this device's tokens of a group.

        Args:
            behind: follows from what `send` returned for the last group, and is computed before.
            status: int32 [], this server's (`messages.status_word`); all servers learn what follows
                from all of them (`messages.agree`).
            memory: `Exchanged.memory` of this layer's last step.

        Returns:
            float32 [t, d]; bool [t], the tokens that have failed; and the layer's traffic.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Calls:
    """The exchange of servers that step on their own, by calls.py."""

    groups: int = 1

    servers = 1

    @property
    def name(self) -> str:
        return f"calls in {self.groups}"

    def memory(self, layers: int) -> tuple[()]:
        return ()

    def send(self, experts: Experts, group: Group, then: Array) -> Array:
        assert isinstance(experts.pool, Array)
        x_td, expert_tk, weight_tk = group.routed
        rows = (x_td, expert_tk, weight_tk, group.valid)
        return calls.send(experts.pool, experts.layer, *rows, then, group.first)

    def receive(
        self, experts: Experts, group: Group, behind: Array, status: Array, memory: Any
    ) -> tuple[Array, Array, Exchanged]:
        assert isinstance(experts.pool, Array)
        t, d = group.routed.x.shape
        sums_td, failed_t = calls.receive(experts.pool, (t, d), behind, group.first)
        return sums_td, failed_t, nothing_exchanged(status, memory)


@dataclasses.dataclass(frozen=True)
class HostCalls:
    """The exchange of servers that step on their own, by host_calls.py."""

    name = "host calls"
    servers = 1
    groups = 1

    def memory(self, layers: int) -> tuple[()]:
        return ()


def nothing_exchanged(status: Array, memory: Any) -> Exchanged:
    """What a step without other servers reports."""
    none = jnp.zeros((1, 1), jnp.int32)
    return Exchanged(none, none, jnp.int32(0), *agree(status[None]), memory)


@dataclasses.dataclass(frozen=True)
class LockStep:
    """The exchange of servers that step together, all in one jax.distributed job.

    Args:
        form: what the pools' slots hold.
        wire_dtype: of hidden states, see `EngineConfig.wire_dtype`.

    Raises:
        UserError: there are more servers than can step together.
    """

    topology: Topology
    form: ExpertFormat
    transport: Transport
    wire_dtype: np.dtype

    groups = 1

    def __post_init__(self) -> None:
        check_together(self.servers)

    @property
    def name(self) -> str:
        return self.transport.name

    @property
    def servers(self) -> int:
        return self.topology.num_servers

    def memory(self, layers: int) -> Any:
        return self.transport.memory(layers)

    def send(self, experts: Experts, group: Group, then: Array) -> Array:
        return then

    def receive(
        self, experts: Experts, group: Group, behind: Array, status: Array, memory: Any
    ) -> tuple[Array, Array, Exchanged]:
        none_t = jnp.zeros(len(group.valid), bool)
        sums_td, exchanged = self._exchange(experts, *group.routed, group.valid, status, memory)
        return sums_td, none_t, exchanged

    def _exchange(
        self,
        experts: Experts,
        x_td: Array,
        expert_tk: Array,
        weight_tk: Array,
        valid_t: Array,
        status: Array,
        memory: Any,
    ) -> tuple[Array, Exchanged]:
        assert experts.tables is not None
        layer, tables = experts.layer, experts.tables
        topology, servers = self.topology, self.topology.num_servers
        slot_e = tables.slot_of[layer]
        ffn = functools.partial(self._ffn, experts.pool, slot_e, len(tables.slot_of))
        expert_tk = jnp.where(valid_t[:, None], expert_tk, NO_EXPERT)
        x_td, weight_tk = (rounded(each, self.wire_dtype) for each in (x_td, weight_tk))
        x_gd, expert_gk, weight_gk = self._gather(Routed(x_td, expert_tk, weight_tk))

        known_gk = expert_gk != NO_EXPERT
        holders_wgk = tables.holders[:, layer, jnp.where(known_gk, expert_gk, 0)]
        here_gk = has(holders_wgk, tables.place[topology.rank])
        visit_gk = choose_servers(holders_wgk, known_gk & ~here_gk, servers)
        own = Routed(x_gd, jnp.where(here_gk, expert_gk, NO_EXPERT), weight_gk)

        if servers == 1:
            sums_td = scatter_siblings(topology, ffn(*own))
            return sums_td, nothing_exchanged(status, memory)

        visit_ngk = visit_gk == tables.place[:, None, None]
        outgoing = Outgoing(
            goes=visit_ngk.any(-1),
            expert=jnp.where(visit_ngk, expert_gk, NO_EXPERT).astype(jnp.uint16),
            weight=weight_gk,
            hidden=encode(x_gd, self.wire_dtype),
        )
        incoming, exchanged = self.transport.dispatch(topology, outgoing, status, memory)
        received = exchanged.rows[:, topology.rank].sum()
        y_gd, sums = self._run_experts(own, incoming, received, ffn)
        returned = self.transport.give_back(topology, sums, outgoing.goes, exchanged.rows)
        for peer in topology.peers:
            arrived_g = outgoing.goes[peer] & (local_index(topology) == 0)
            y_gd += jnp.where(arrived_g[:, None], returned[peer], 0.0)
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
        self, own: Routed, incoming: Incoming, received: Array, ffn: Callable[..., Array]
    ) -> tuple[Array, Array]:
        """Sums of this server's experts for its own tokens and for what peers sent.

        Args:
            own: tokens of this server, with the experts that are here.
            incoming: peers' rows, of which the first `received`, int32 [], count.
            ffn: sums of this device's experts for rows.

        Returns:
            float32 [g, d], this device's experts alone; and per row of `incoming` the sum to give
            back, float32 [r, d], right on the gateway.
        """
        room = incoming.expert.shape[0]

        def run(limit: int) -> tuple[Array, Array]:
            expert, weight, hidden = jax.tree.map(lambda column: column[:limit], incoming)
            present = jnp.arange(limit)[:, None] < received
            expert = jnp.where(present, expert, NO_EXPERT).astype(jnp.int32)
            theirs = Routed(decode(hidden, own.x.dtype), expert, weight)
            rows = Routed(*(jnp.concatenate(parts) for parts in zip(own, theirs, strict=True)))
            y_gd, y_rd = jnp.split(ffn(*rows), [own.x.shape[0]])
            sums_rd = sum_at_gateway(self.topology, y_rd, received)
            return y_gd, jnp.pad(sums_rd, ((0, room - limit), (0, 0)))

        limits = [*(limit for limit in LIMITS if limit < room), room]
        branch = jnp.sum(jnp.array(limits[:-1], jnp.int32) < received, dtype=jnp.int32)
        return lax.switch(branch, [functools.partial(run, limit) for limit in limits])

    def _ffn(
        self,
        pool: Pool,
        slot_e: Array,
        layers: int,
        x_nd: Array,
        expert_nk: Array,
        weight_nk: Array,
    ) -> Array:
        known_nk = expert_nk != NO_EXPERT
        slot_nk = jnp.where(known_nk, slot_e[jnp.where(known_nk, expert_nk, 0)], -1)
        return self.form.ffn(pool, x_nd, slot_nk, weight_nk, layers)
