"""Messages of lock step, from engine to engine over collectives: rows, their encoding, statuses.

A `Transport` carries them (collectives.py). Servers that step on their own send expert calls
instead (call_messages.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.models.topology import Topology

#: Means "no expert" in arrays of uint16 expert numbers.
NO_EXPERT = 0xFFFF
#: Low bits of a server's status, an int32, that hold its work; the higher bits are a batch.
WORK_BITS = 2
#: Arrays that hold parts of the same rows; their leading axes are equal.
Columns = tuple[Array, ...]


class Outgoing(NamedTuple):
    """A server's rows for other servers; n servers, g rows of all its devices."""

    #: bool [n, g], whether a row goes to a server; always False for this server.
    goes: Array
    #: uint16 [n, g, k], experts that a row needs from a server; NO_EXPERT for none.
    expert: Array
    #: float32 [g, k].
    weight: Array
    #: [g, ...] each, hidden states encoded by `encode`.
    hidden: Columns


class Incoming(NamedTuple):
    """Rows received from other servers, ordered by rank, followed by arbitrary rows.

    Fields are as in `Outgoing`, without the axis of servers.
    """

    expert: Array
    weight: Array
    hidden: Columns


class Exchanged(NamedTuple):
    """Report of one layer's exchange; equal on all servers except for `away`."""

    #: int32 [n, n], rows sent from server (first axis) to server (second axis).
    rows: Array
    #: int32 [n, n], payload bytes from server to server, including sums.
    bytes: Array
    #: int32 [], this server's rows that went to any other server.
    away: Array
    #: int32 [], the maximum of all servers' work (`agree`).
    work: Array
    #: int32 [], the batch of experts that all servers are ready to apply; 0 if they do not name
    #: the same batch (`agree`).
    loaded: Array
    #: State of the transport for this layer's next exchange.
    memory: Any


class Transport(Protocol):
    """Carries rows between servers, inside shard_map over AXIS.

    Every device of a server passes the same rows and receives the same rows; returned sums are
    valid on the gateway.
    """

    @property
    def name(self) -> str:
        """Name of the transport; part of the key of compiled steps."""
        ...

    def memory(self, layers: int) -> Any:
        """`Exchanged.memory` before the first step: numpy arrays with a leading axis of layers."""
        ...

    def dispatch(
        self, topology: Topology, outgoing: Outgoing, status: Array, memory: Any
    ) -> tuple[Incoming, Exchanged]:
        """Send every server its rows.

        Args:
            status: int32 [], this server's status, see `status_word`.
            memory: `Exchanged.memory` of this layer's previous exchange.
        """
        ...

    def give_back(self, topology: Topology, sums: Array, goes: Array, rows: Array) -> Array:
        """Send back the sums for received rows.

        Args:
            sums: float32 [rows of `Incoming`, d], one sum per received row, valid on the gateway.
            goes: `Outgoing.goes`; rows: `Exchanged.rows`.

        Returns:
            float32 [n, g, d], valid on the gateway: each server's sums for the rows that went to
            it, and arbitrary values for other rows.
        """
        ...


def status_word(work: int, loaded: int) -> int:
    """Encode a server's status in one int32: its work and the batch it can apply.

    Args:
        work: a number below 2 ** WORK_BITS.
        loaded: the batch of experts that the server is ready to apply next; 0 for none.
    """
    return work | loaded << WORK_BITS


def agree(status_n: Array) -> tuple[Array, Array]:
    """`Exchanged.work` and `.loaded` from the statuses of all servers, int32 [n].

    A batch takes effect only if all servers name the same batch. A server that does not know yet
    that a batch was dropped must not count as ready for the next one, nor the other servers as
    ready for the dropped one.
    """
    work_n, batch_n = status_n & (2**WORK_BITS - 1), status_n >> WORK_BITS
    return work_n.max(), jnp.where((batch_n == batch_n[0]).all(), batch_n[0], 0)


def encode(x_nd: Array, dtype: np.dtype) -> Columns:
    """Encode rows [n, d] for the wire in `dtype`; int8 has a float32 scale per row, [n, 1].

    With int8 the error of a value is at most half a scale: its row's largest value / 254.
    """
    if dtype != jnp.int8:
        return (x_nd.astype(dtype),)
    wide_nd = x_nd.astype(jnp.float32)
    scale_n1 = jnp.max(jnp.abs(wide_nd), axis=-1, keepdims=True) / 127
    steps_nd = jnp.round(wide_nd / jnp.where(scale_n1 > 0, scale_n1, 1))
    return steps_nd.astype(jnp.int8), scale_n1


def decode(columns: Columns, dtype: np.dtype) -> Array:
    """Inverse of `encode`, in `dtype`."""
    x_nd, *scale = columns
    if not scale:
        return x_nd.astype(dtype)
    return (x_nd.astype(jnp.float32) * scale[0]).astype(dtype)


def rounded(x_nd: Array, dtype: np.dtype) -> Array:
    """Round rows for local experts as the wire rounds them for remote experts, except int8."""
    if dtype == jnp.int8:
        return x_nd
    # XLA may optimise away a pair of conversions, so reduce the precision explicitly.
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x_nd, info.nexp, info.nmant)


def row_bytes(columns: Columns) -> int:
    """Bytes of one row; each column is [rows, values]."""
    return sum(column.shape[-1] * column.dtype.itemsize for column in columns)


def join_columns(columns: Columns) -> Array:
    """Join columns [..., w] into uint8 [..., bytes of a row]."""
    return jnp.concatenate([_to_bytes(column) for column in columns], -1)


def split_columns(rows: Array, like: Columns) -> Columns:
    """Inverse of `join_columns`; `like` gives the dtypes and widths of the columns."""
    ends = np.cumsum([column.shape[-1] * column.dtype.itemsize for column in like])
    parts = jnp.split(rows, ends[:-1], axis=-1)
    return tuple(_from_bytes(part, column.dtype) for part, column in zip(parts, like, strict=True))


def _to_bytes(x: Array) -> Array:
    parts = lax.bitcast_convert_type(x, jnp.uint8)
    return parts if parts.ndim == x.ndim else parts.reshape(*x.shape[:-1], -1)


def _from_bytes(parts: Array, dtype: np.dtype) -> Array:
    if dtype.itemsize > 1:
        parts = parts.reshape(*parts.shape[:-1], -1, dtype.itemsize)
    return lax.bitcast_convert_type(parts, dtype)
