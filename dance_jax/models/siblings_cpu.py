"""Collectives between the devices of one server on CPUs, through memory (native/siblings.cc).

XLA's collectives on CPUs use the network even within a process, one message after another. With
servers of 1, 1 and 2 devices, they took most of a layer's time whenever the links were fast
(measured). All devices of a server must make the same calls in the same order; data dependencies
ensure that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dance_jax.models import native


def gather(device: Array, devices: int, x_td: Array) -> Array:
    """Gather the rows of all devices of a server, in the order of devices: [devices * t, d].

    Args:
        device: int32 [], number of this device within its server.
        devices: number of devices of the server.
        x_td: [t, d] of any dtype.
    """
    shape = jax.ShapeDtypeStruct((devices * x_td.shape[0], *x_td.shape[1:]), x_td.dtype)
    return _call("SiblingsGather", shape, devices, device, x_td)


def sum_rows(
    device: Array, devices: int, y_nd: Array, first: Array, count: Array, rows: int
) -> Array:
    """Rows [first, first + count) of the sum over devices.

    Args:
        device, devices: see `gather`.
        y_nd: float32 [n, d].
        first, count: int32 []; may differ between devices.
        rows: rows of the result.

    Returns:
        float32 [rows, d]; rows from `count` on are arbitrary.
    """
    shape = jax.ShapeDtypeStruct((rows, y_nd.shape[1]), y_nd.dtype)
    return _call("SiblingsSum", shape, devices, device, first, count, y_nd)


def _call(
    symbol: str, result: jax.ShapeDtypeStruct, devices: int, device: Array, *operands: Array
) -> Array:
    handler = jax.ffi.ffi_call(native.target(symbol), result, has_side_effect=True)
    return handler(device.astype(jnp.int32), *operands, devices=np.int64(devices))
