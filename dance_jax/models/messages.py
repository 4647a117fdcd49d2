"""What crosses the links between servers: rows, how they are encoded, what is known of them.

Who carries them is a `Transport`: collectives.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.models.topology import Topology

#: Marks "no expert" where expert numbers are uint16.
NO_EXPERT = 0xFFFF
#: What a server says of itself is one int32: in the low bits its work, above them a batch.
WORK_BITS = 2
#: Arrays that hold parts of the same rows; the leading axes are equal.
Columns = tuple[Array, ...]


class Outgoing(NamedTuple):
    """A server's rows for the others; n servers, g rows of all its devices."""

    #: bool [n, g], the row goes to the server; none goes to the own one.
    goes: Array
    #: uint16 [n, g, k], experts the row wants of the server; NO_EXPERT: none.
    expert: Array
    #: float32 [g, k].
    weight: Array
    #: [g, ...] each, hidden states as `encode` made them.
    hidden: Columns


class Incoming(NamedTuple):
    """Rows that others sent, at the front, in the order of their ranks; what follows is anything.

    As in `Outgoing`, without the axis of servers.
    """

    expert: Array
    weight: Array
    hidden: Columns


class Exchanged(NamedTuple):
    """What one layer's exchange reports; the same on all servers, except `away`."""

    #: int32 [n, n], rows sent from server (first axis) to server (second axis).
    rows: Array
    #: int32 [n, n], payload bytes from server to server, sums included.
    bytes: Array
    #: int32 [], rows of this server that went to any other server.
    away: Array
    #: int32 [], the most work that a server has; the batch of experts that all are ready to put in
    #: place, 0 where they do not name the same (`agree`).
    work: Array
    loaded: Array
    #: What the transport wants to know in this layer's next exchange.
    memory: Any


class Transport(Protocol):
    """Carries rows between servers, inside shard_map over AXIS.

    Every device of a server calls it with the same rows and gets the same rows; the sums that come
    back are right on the gateway.
    """

    @property
    def name(self) -> str:
        """Compiled steps depend on it."""
        ...

    def memory(self, layers: int) -> Any:
        """`Exchanged.memory` before the first step: numpy arrays with a leading axis of layers."""
        ...

    def dispatch(
        self, topology: Topology, outgoing: Outgoing, status: Array, memory: Any
    ) -> tuple[Incoming, Exchanged]:
        """Sends every server its rows.

        Args:
            status: int32 [], by this server, see `status_word`.
            memory: of this layer's last exchange.
        """
        ...

    def give_back(self, topology: Topology, sums: Array, goes: Array, rows: Array) -> Array:
        """Sends back the sums of the rows that came.

        Args:
            sums: float32 [as `Incoming`, d], one row for each that came, right on the gateway.
            goes: `Outgoing.goes`; rows: `Exchanged.rows`.

        Returns:
            float32 [n, g, d], on the gateway: the server's sum of each row that went to it,
            anything in the others' places.
        """
        ...


def status_word(work: int, loaded: int) -> int:
    """A server's status for the others, in one int32: its work and the batch it can apply.

    Args:
        work: a number below 2 ** WORK_BITS.
        loaded: the batch that it is ready to put in place next; 0: none.
    """
    return work | loaded << WORK_BITS


def agree(status_n: Array) -> tuple[Array, Array]:
    """`Exchanged.work` and `.loaded` from the status of all servers, int32 [n].

    A batch takes effect only where all name the same one: a server that has not heard yet that one
    was dropped cannot be taken for ready for the next, nor the others for ready for that one.
    """
    work_n, batch_n = status_n & (2**WORK_BITS - 1), status_n >> WORK_BITS
    return work_n.max(), jnp.where((batch_n == batch_n[0]).all(), batch_n[0], 0)


def encode(x_nd: Array, dtype: np.dtype) -> Columns:
    """[n, d] as it travels: in `dtype`; int8 with a float32 scale per row, [n, 1].

    A value is off by at most half a scale, its row's largest value / 254.
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
    """What experts of this very server see of rows: what others' do, but for int8."""
    if dtype == jnp.int8:
        return x_nd
    # Not by two conversions, which XLA may leave out.
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x_nd, info.nexp, info.nmant)


def row_bytes(columns: Columns) -> int:
    """Bytes of one row; each column has one axis of rows, then one of values."""
    return sum(column.shape[-1] * column.dtype.itemsize for column in columns)


def join_columns(columns: Columns) -> Array:
    """[..., w] each -> uint8 [..., bytes of a row]."""
    return jnp.concatenate([_to_bytes(column) for column in columns], -1)


def split_columns(rows: Array, like: Columns) -> Columns:
    """Inverse of `join_columns`; `like` has the columns' dtypes and widths."""
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
