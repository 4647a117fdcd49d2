"""Exchanges: they compute the routed experts of one MoE layer, local and remote.

`Calls`: each server steps independently, and the C++ library calls other servers for experts that
are not local (calls.py). `HostCalls`: the same, but the host makes the calls between two parts of
the step (host_calls.py). `LockStep`: all servers run each step together. With `LockStep`, every
process compiles its own program of the step, with its own token count and pool size; only the
sequence of messages between two processes must agree. A transport carries the messages
(lock_step_messages.py). A server's first device is its gateway: only gateways use the slow links,
so a token crosses a link once per server that it needs. Within a server the devices gather their
tokens, each device computes the experts it holds, and the sums are scattered back (topology.py).
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
from dance_jax.models.lock_step_messages import (
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

#: Numbers of rows from all peers for which the experts are compiled, in addition to the maximum:
#: a few rows must not cost as much as the rows of a prefill.
LIMITS = (16, 128)


class Tables(NamedTuple):
    """Locations of experts, as arguments of the step, per device; l MoE layers, e experts."""

    #: `visit.masks` [words, l, e] of the servers that hold each expert; bits are in the order in
    #: which this server prefers to call the servers.
    holders: Array
    #: int32 [l, e], slot on this device; -1 if the expert is not on this device.
    slot_of: Array
    #: int32 [n], place of each server in that order.
    place: Array


class Experts(NamedTuple):
    """Inputs of a layer with routed experts besides its tokens."""

    #: int32 [], index among the layers with routed experts.
    layer: Array
    #: Pool of this device; or, with `Calls`, int32 [], one of `calls.CallServer.callers`.
    pool: Pool
    #: Locations of experts; None if the C++ library has them.
    tables: Tables | None


class Group(NamedTuple):
    """Tokens of a device, all or some, whose calls for routed experts are sent together."""

    #: Hidden states [t, d], experts int32 [t, k] and their weights float32 [t, k].
    routed: Routed
    #: bool [t], False for tokens that are not routed.
    valid: Array
    #: Number of tokens in earlier groups.
    first: int


class Exchange(Protocol):
    """The way in which a layer's local and remote routed experts are computed."""

    @property
    def name(self) -> str:
        """Name of the exchange; part of the key of compiled steps."""
        ...

    @property
    def servers(self) -> int:
        """Number of servers that take part in every step."""
        ...

    def memory(self, layers: int) -> Any:
        """`Exchanged.memory` before the first step: numpy arrays with a leading axis of layers."""
        ...


class TracedExchange(Exchange, Protocol):
    """An exchange that is traced as part of a layer, inside shard_map over AXIS."""

    @property
    def groups(self) -> int:
        """Most groups into which a layer splits the rows of prefill slices."""
        ...

    def send(self, experts: Experts, group: Group, then: Array) -> Array:
        """Send calls for a group's routed experts, if the exchange can do so without waiting.

        Args:
            then: input of the computation that is to run after sending.

        Returns:
            `then`, unchanged.
        """
        ...

    def receive(
        self, experts: Experts, group: Group, behind: Array, status: Array, memory: Any
    ) -> tuple[Array, Array, Exchanged]:
        """Weighted sums of routed experts for this device's tokens of a group.

        Args:
            behind: an array that depends on the result of the last `send`; it is computed first.
            status: int32 [], this server's status (`lock_step_messages.status_word`); all
                servers learn the combination of all statuses (`lock_step_messages.agree`).
            memory: `Exchanged.memory` of this layer in the previous step.

        Returns:
            float32 [t, d]; bool [t], tokens that failed; and the layer's traffic.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Calls:
    """Exchange between servers that step independently, by calls.py."""

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
    """Exchange between servers that step independently, by host_calls.py."""

    name = "host calls"
    servers = 1
    groups = 1

    def memory(self, layers: int) -> tuple[()]:
        return ()


def nothing_exchanged(status: Array, memory: Any) -> Exchanged:
    """The traffic of a step without other servers."""
    none = jnp.zeros((1, 1), jnp.int32)
    return Exchanged(none, none, jnp.int32(0), *agree(status[None]), memory)


@dataclasses.dataclass(frozen=True)
class LockStep:
    """Exchange between servers that step together, all in one jax.distributed job.

    Args:
        form: format of the experts in the pools.
        wire_dtype: type of hidden states on the wire, see `EngineConfig.wire_dtype`.

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
        """Tokens of all devices of this server; expert numbers are gathered as uint16."""
        columns = (own.x, own.expert.astype(jnp.uint16), own.weight)
        if self.topology.siblings > 1:
            rows = gather_siblings(self.topology, join_columns(columns))
            columns = split_columns(rows, columns)
        x_gd, expert_gk, weight_gk = columns
        return Routed(x_gd, expert_gk.astype(jnp.int32), weight_gk)

    def _run_experts(
        self, own: Routed, incoming: Incoming, received: Array, ffn: Callable[..., Array]
    ) -> tuple[Array, Array]:
        """Sums of this server's experts for its own tokens and for the rows from peers.

        Args:
            own: tokens of this server, with their local experts only.
            incoming: rows from peers, of which the first `received`, int32 [], are valid.
            ffn: computes the sums of this device's experts for rows.

        Returns:
            float32 [g, d], the sums of this device's experts only; and float32 [r, d], the sum to
            send back for each row of `incoming`, valid on the gateway.
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
